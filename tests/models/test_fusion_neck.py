"""The classification neck; refusals are in test_bad_input.py, too."""

from __future__ import annotations

import golden
import pytest
import torch
from torch import nn

from mmhrformer import MODELS, HRFormerFusion
from mmhrformer.models import ARCHS

CHANNELS = (4, 6, 8, 10)


def make_neck(**options) -> HRFormerFusion:
    neck = HRFormerFusion(
        **{'in_channels': CHANNELS, 'mid_channels': (1, 2, 3, 4), 'out_channels': 20, **options}
    )
    golden.recipe.fill_module(neck)
    return neck.eval()


def streams(height: int, width: int) -> list[torch.Tensor]:
    """Streams like those of the backbone for an image of this size."""
    sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(2, 6)]
    return [golden.image((2, c, *size), seed=c) for c, size in zip(CHANNELS, sizes)]


def test_one_map_of_a_thirty_second():
    for height, width in ((32, 32), (64, 96), (97, 161), (33, 65)):
        xs = streams(height, width)
        before = [x.clone() for x in xs]
        (out,) = make_neck()(xs)
        assert out.shape == (2, 20, -(-height // 32), -(-width // 32))
        assert out.min() == 0  # it ends with a ReLU
        assert out.max() > 0
        assert all(torch.equal(x, y) for x, y in zip(xs, before))


def test_sum_runs_from_the_finest_to_the_coarsest_stream():
    neck, xs = make_neck(), streams(64, 96)
    x0, x1, x2, x3 = (widen(x) for widen, x in zip(neck.incre_modules, xs))
    down0, down1, down2 = neck.downsamp_modules
    expected = neck.final_layer(x3 + down2(x2 + down1(x1 + down0(x0))))
    torch.testing.assert_close(neck(xs), (expected,))


def test_every_stream_and_parameter_matters():
    neck, xs = make_neck(), streams(64, 64)
    for x in xs:
        x.requires_grad_()
    neck(xs)[0].square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in xs)
    assert all(parameter.grad is not None for parameter in neck.parameters())


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_parameters_are_as_many_as_the_official_ones(arch):
    cfg = dict(type='mmhrformer.HRFormerFusion', in_channels=ARCHS[arch]['channels'])
    with torch.device('meta'):
        neck = MODELS.build(cfg)
    classifier = 2048 * 1000 + 1000
    official = golden.read_json('params_flops.json')['parameters'][f'cls {arch}']['cls_head']
    assert sum(p.numel() for p in neck.parameters()) + classifier == official


def test_normalization_can_be_chosen():
    neck = HRFormerFusion(CHANNELS, norm_cfg=dict(type='GN', num_groups=2))
    assert not [m for m in neck.modules() if isinstance(m, nn.BatchNorm2d)]
    for wrong in (None, 'BN', dict(type='LN'), dict(type='BN1d'), dict(type='GN', num_groups=7)):
        with pytest.raises(ValueError, match=r"norm_cfg=.*dict\(type='BN'\)"):
            HRFormerFusion(CHANNELS, norm_cfg=wrong)


def test_normalization_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"'num_groups': 64.* divides all channels, \[4, 6, 8, "):
        HRFormerFusion(CHANNELS, norm_cfg=dict(type='GN', num_groups=64))

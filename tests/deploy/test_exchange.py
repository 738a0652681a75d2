"""The exchange of exported files gives what the one of the model does."""

from __future__ import annotations

import copy

import golden
import pytest
import torch
from torch import nn

from mmhrformer.deploy.exchange import ChannelsLastModule, use_channels_last
from mmhrformer.deploy.fuse import fold_batch_norm
from mmhrformer.models.hr_module import HRModule

CHANNELS = (6, 8, 10)


def make_module(upsample: str = 'nearest', out_streams: tuple[int, ...] = (0, 1, 2)) -> HRModule:
    """A module without blocks, whose normalizations have learned something and are folded."""
    branches = [nn.Identity() for _ in CHANNELS]
    module = HRModule(branches, CHANNELS, out_streams, upsample, dict(type='BN')).eval()
    golden.recipe.fill_module(module)
    return fold_batch_norm(module)


@pytest.mark.parametrize('upsample', ['nearest', 'bilinear'])
@pytest.mark.parametrize('out_streams', [(0, 1, 2), (0,), (1, 2)], ids=str)
@pytest.mark.parametrize('sizes', [((8, 12), (4, 6), (2, 3)), ((9, 5), (5, 3), (3, 2))], ids=str)
@torch.no_grad()
def test_streams_are_exchanged_as_in_the_model(upsample, out_streams, sizes):
    module = make_module(upsample, out_streams)
    xs = [golden.image((2, c, *size), seed=c) for c, size in zip(CHANNELS, sizes)]
    wanted = module(xs)
    outs = ChannelsLastModule(copy.deepcopy(module))(xs)
    for i, (out, like) in enumerate(zip(outs, wanted, strict=True)):
        assert (out is None) == (like is None) == (i not in out_streams)
        if out is not None:
            torch.testing.assert_close(out, like, atol=1e-5, rtol=1e-5)


def test_channels_are_padded_to_a_multiple_of_4():
    (model,) = use_channels_last(nn.Sequential(make_module()))
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert {conv.in_channels for conv in convs} == {8, 12}
    assert {conv.out_channels for conv in convs if conv.groups == 1} == {6, 8, 10}


def test_other_modules_are_left_alone():
    plain = HRModule([nn.Identity()] * 3, CHANNELS, (0,), 'nearest', dict(type='BN'))
    hooked, changed = make_module(), make_module()
    hooked.register_forward_hook(lambda *args: None)
    changed.fuse_layers[0][1][0] = nn.Sequential(changed.fuse_layers[0][1][0])
    model = use_channels_last(nn.Sequential(plain, hooked, changed))
    assert [type(module) for module in model] == [HRModule] * 3

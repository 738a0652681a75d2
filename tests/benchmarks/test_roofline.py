"""benchmarks/roofline.py: counts of single layers by hand, and of a small backbone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from mmengine.utils import digit_version
from torch import nn

from mmhrformer import HRFormer, fuse_for_inference, ops
from mmhrformer.ops import triton_support

MICRO = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
BLOCKS = 2 + 3 + 4
can_count = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.5'), reason='needs torch 2.5'
)


@pytest.fixture(scope='module')
def tool() -> Iterator[ModuleType]:
    before = list(sys.path)
    yield importlib.import_module('roofline')
    sys.path[:] = before


# In bfloat16: x of (2, 8, 4, 4) has 512 bytes, y of 16 channels 1024, the weight 256, the bias 32.
@can_count
@pytest.mark.parametrize(
    ('bias', 'kernels', 'size'),
    [(False, 1, 512 + 256 + 1024), (True, 2, 512 + 256 + 1024 + 1024 + 32 + 1024)],
)
def test_convolution(tool, bias, kernels, size):
    counted = tool.count(nn.Conv2d(8, 16, 1, bias=bias), (2, 8, 4, 4))
    assert counted.operators == 1
    assert counted.kernels == {'convolution': kernels}
    assert counted.bytes == {'convolution': size}
    assert counted.flops == 2 * (2 * 4 * 4) * 8 * 16


@can_count
def test_training_step_of_a_normalized_convolution(tool):
    layers = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.GELU())
    counted = tool.count(layers, (2, 8, 4, 4), 'train')
    y, statistics, affine, running = 1024, 2 * 16 * 4, 2 * 16 * 2, 2 * 16 * 2
    assert counted.bytes['native_batch_norm'] == 3 * y + statistics + affine + running
    assert counted.bytes['gelu'] == 2 * y
    assert counted.bytes['gelu_backward'] == 3 * y
    # The images need no gradient: that of the weight reads y and x, that of the bias y.
    assert counted.bytes['convolution_backward'] == (y + 512 + 256) + (y + 32)
    kernels = {'native_batch_norm': 2, 'native_batch_norm_backward': 2, 'convolution_backward': 2}
    assert {name: counted.kernels[name] for name in kernels} == kernels
    assert counted.flops == 2 * 2 * (2 * 4 * 4) * 8 * 16


@can_count
def test_linear_layer_with_a_view_and_an_operator_of_ours(tool):
    @torch.library.custom_op('roofline_test::twice', mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)

    class Layer(nn.Linear):
        def forward(self, x):
            return twice(super().forward(x.permute(0, 2, 3, 1).reshape(-1, 8)))

    counted = tool.count(Layer(8, 16), (2, 8, 4, 4))
    assert counted.bytes == {'addmm': 512 + 256 + 32 + 1024, 'twice': 2 * 1024}
    assert counted.operators == 2


@can_count
def test_backbone(tool):
    def count(model, *options):
        return tool.count(model, (1, 3, 64, 64), *options)

    torch.manual_seed(0)
    plain, training = count(HRFormer(arch=MICRO)), count(HRFormer(arch=MICRO), 'train')
    with ops.use('cuda'):
        folded = count(fuse_for_inference(HRFormer(arch=MICRO)))
    attention = '_scaled_dot_product_efficient_attention'
    assert plain.kernels[attention] == folded.kernels[attention] == BLOCKS
    assert training.kernels[f'{attention}_backward'] == BLOCKS
    assert 'native_batch_norm' not in folded.kernels
    assert folded.bytes.total() < plain.bytes.total() < training.bytes.total() / 2
    reference = count(HRFormer(arch=MICRO), 'infer', 'reference')
    assert not reference.kernels[attention]
    assert reference.kernels['bmm'] == 2 * BLOCKS
    assert plain.kernels['clone'] < 4 * BLOCKS  # no map is copied to another memory format


@can_count
@pytest.mark.skipif(bool(triton_support.why_not()), reason='needs Triton')
def test_kernels_of_folded_blocks(tool):
    """Six a block, though no GPU is there to run them."""
    torch.manual_seed(0)
    with tool.peers.use('kernels'):
        folded = fuse_for_inference(HRFormer(arch=MICRO))
    counted = tool.count(folded, (1, 3, 64, 64), 'infer', 'kernels')
    plain = tool.count(folded, (1, 3, 64, 64), 'infer', 'cuda')
    assert counted.kernels['linear_gelu'] == 4 * BLOCKS
    assert counted.kernels['window_attention'] == BLOCKS
    assert counted.kernels['depthwise_gelu'] >= BLOCKS
    assert counted.bytes.total() < plain.bytes.total()


@can_count
@pytest.mark.skipif(bool(triton_support.why_not()), reason='needs Triton')
def test_kernels_of_a_training_step(tool):
    """Nothing is converted, copied or computed twice, and most biases need no sum of their own."""
    torch.manual_seed(0)
    models = {form: HRFormer(arch=MICRO) for form in ('cuda', 'kernels')}
    plain, counted = (tool.count(m, (2, 3, 64, 64), 'train', form) for form, m in models.items())
    assert not {'_to_copy', 'copy_', 'clone'} & {*counted.kernels}
    convs = [m for m in models['cuda'].modules() if isinstance(m, nn.Conv2d)]
    strided = sum(conv.groups > 1 and conv.stride == (2, 2) for conv in convs)  # of exchanges
    assert counted.kernels['depthwise_gelu'] == BLOCKS + strided
    assert counted.kernels['depthwise_weight_grad'] == BLOCKS
    assert counted.kernels['batch_norm_normalize'] == 3 * BLOCKS
    assert counted.kernels['sum'] == BLOCKS  # of the projections behind attention
    assert counted.kernels['add_'] == plain.kernels['add_'] - 3 * BLOCKS
    assert counted.operators < 0.8 * plain.operators
    assert counted.bytes.total() < 0.8 * plain.bytes.total()


@can_count
def test_padded_models_are_folded_for_kernels(tool):
    """Even if they cannot run here; the padding is a small part of the work."""
    torch.manual_seed(0)
    arch = dict(MICRO, channels=(30, 62, 64, 64), num_heads=(2, 2, 2, 2))
    folded, padded = (tool.peers.fold(HRFormer(arch=arch), pad) for pad in (False, True))
    assert padded.stage4[0].branches[0][0].attn.qkv.in_features == 32
    plain, more = (tool.count(model, (1, 3, 64, 64)).flops for model in (folded, padded))
    assert plain < more < 1.1 * plain


def test_table(tool, capsys):
    args = tool.make_parser().parse_args(['--bandwidth', '2', '--tflops', '500', '--launch', '5'])
    counted = tool.Count()
    counted.bytes.update(gelu=6 * 10**9)
    counted.kernels.update(gelu=400)
    counted.flops = 10**12
    assert tool.bounds(counted, args) == dict(memory=3.0, tensor=2.0, launch=2.0)
    tool.print_row('ours', counted, 30, args)
    name, flops, size, kernels, *_, images, longest = capsys.readouterr().out.split()
    assert (name, flops, size, kernels) == ('ours', '33.3', '200', '400')
    assert (images, longest) == ('10000', 'memory')


def test_what_cannot_be_counted_is_told(tool, capsys, monkeypatch):
    options = ['--models', 'ours-compiled', 'theirs', '--arch', 'tiny']
    monkeypatch.setattr(sys, 'argv', ['roofline.py', *options])
    tool.main()
    _, compiled, theirs = capsys.readouterr().out.splitlines()
    assert compiled.endswith(
        "skipped: only the suffixes ['fused', 'padded', 'with-cp'] affect the counts"
    )
    assert "skipped: there is no candidate 'theirs'" in theirs

"""Folded models whose streams have zero channels appended give the results of those without."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache

import golden
import pytest
import torch
from graphs import can_compile_blocks
from torch import Tensor, nn

from mmhrformer import HRFormer, compile_blocks, fuse_for_inference, ops
from mmhrformer.deploy.fuse import CroppedStreams, FusedBlock
from mmhrformer.models.hr_module import HRModule
from mmhrformer.ops import cpu, kernels

pytestmark = pytest.mark.once
# In the FFNs 44 channels become 48, 60 become 64, and 36 become 40.
CHANNELS = (22, 30, 32, 18)
PADDED = (24, 32, 32, 18)
ARCH = dict(
    channels=CHANNELS, num_heads=(2, 3, 4, 2), num_modules=(1, 1, 2), num_blocks=1, mlp_ratio=2
)


def make_backbone(**options) -> HRFormer:
    """A backbone whose normalizations have learned something."""
    if not options:
        return copy.deepcopy(_make_default())
    model = HRFormer(**{'arch': ARCH, 'window_size': 5, **options})
    golden.recipe.fill_module(model)
    return model.eval()


@cache
def _make_default() -> HRFormer:
    return make_backbone(arch=ARCH)


@pytest.fixture
def pad(monkeypatch) -> Callable[[nn.Module], nn.Module]:
    """Folding with the padding of Triton's kernels, where there are none."""

    def fold(model: nn.Module) -> nn.Module:
        with monkeypatch.context() as patch:
            patch.setattr(cpu, 'channel_padding', kernels.channel_padding)
            return fuse_for_inference(model)

    return fold


def is_padded(model: nn.Module) -> bool:
    return any(isinstance(module, CroppedStreams) for module in model.modules())


def assert_equal(model: nn.Module, other: nn.Module, x: Tensor, bound: float = 1e-5) -> None:
    """Compare outputs, by the largest number of each."""
    with torch.no_grad():
        for a, b in zip(model(x), other(x), strict=True):
            assert a.shape == b.shape
            assert a.stride() == b.stride()
            torch.testing.assert_close(b, a, atol=bound * a.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(with_rpe=False, upsample='bilinear', out_indices=(0, 2)),
        dict(arch=dict(ARCH, channels=(32, 15, 30, 46), num_heads=(2, 3, 2, 2), mlp_ratio=3)),
    ],
    ids=str,
)
@pytest.mark.parametrize('form', ['cpu', 'reference', 'cuda'])
def test_outputs_stay_equal(pad, options, form):
    """At a size at which windows are padded, and at one at which they are not."""
    model = make_backbone(**options)
    plain, padded = fuse_for_inference(model), pad(model)
    assert is_padded(padded)
    with ops.use(form):
        for size in ((80, 160), (97, 161)):
            assert_equal(plain, padded, golden.image((2, 3, *size)))


def test_differences_are_rounding(pad):
    model = make_backbone().double()
    x = golden.image((2, 3, 97, 161)).double()
    assert_equal(fuse_for_inference(model), pad(model), x, 1e-13)


def test_what_is_padded(pad):
    """All maps of the streams and in FFNs are padded, if by at most an eighth."""
    padded = pad(make_backbone())
    block, untouched = padded.stage4[0].branches[0][0], padded.stage4[0].branches[3][0]
    seen = [block.ffn.fc1, block.ffn.dw3x3, block.ffn.fc2, block.attn.proj]
    assert [len(layer.weight) for layer in seen] == [48, 48, 24, 24]
    assert block.attn.qkv.weight.shape == (3 * CHANNELS[0], 24)
    assert block.norm1.normalized_shape == block.norm2.normalized_shape == (22,)
    assert type(untouched.norm1) is nn.LayerNorm
    for conv in (module for module in padded.modules() if isinstance(module, nn.Conv2d)):
        shape = conv.out_channels, conv.in_channels // conv.groups
        assert conv.weight.shape[:2] == shape
        assert conv.bias is None or len(conv.bias) == shape[0]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_zeros_stay_zeros_and_no_caller_sees_them(pad, memory_format):
    model = make_backbone()
    padded, seen = pad(model), []
    padded.stage4[-1].register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
    padded.stage4[-2].register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
    x = golden.image((2, 3, 97, 161)).contiguous(memory_format=memory_format)
    outs = padded(x)
    assert [out.shape[1] for out in outs] == list(CHANNELS)
    assert all(out.is_contiguous(memory_format=memory_format) for out in outs)
    assert [stream.shape[1] for stream in seen] == [*PADDED, *PADDED]
    for stream, channels in zip(seen, 2 * CHANNELS):
        assert not stream[:, channels:].any()


def test_triton_alone_and_unless_refused(monkeypatch):
    base = dict(ARCH, channels=(78, 156, 312, 624), num_heads=(2, 4, 8, 16))
    model = make_backbone(arch=base)
    for form in ('cpu', 'cuda', 'reference'):
        with ops.use(form):
            assert not is_padded(fuse_for_inference(model))
    monkeypatch.setattr(ops.dispatch, 'why_not', lambda device: '')
    with ops.use('kernels'):
        assert not is_padded(fuse_for_inference(model, pad_channels=False))
        padded = fuse_for_inference(model)
    blocks = [branch[0] for branch in padded.stage4[0].branches]
    assert [block.attn.qkv.in_features for block in blocks] == [80, 160, 312, 624]
    assert [block.attn.qkv.out_features for block in blocks] == [240, 480, 960, 1920]
    assert_equal(model, padded, golden.image((1, 3, 64, 64)))


def test_widths_of_which_none_is_padded(pad):
    arch = dict(ARCH, channels=(16, 18, 24, 32), num_heads=(2, 2, 2, 2), mlp_ratio=4)
    assert not is_padded(pad(make_backbone(arch=arch)))


def hook(name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_submodule(name).register_forward_hook(lambda module, args, out: out)

    return change


def replace(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))

    return change


class LowRank(nn.Module):
    """A layer with an update beside it, like LoRA's."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.down = layer, nn.Linear(layer.in_features, 2)
        self.up = nn.Linear(2, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class OtherModule(HRModule):
    """An exchange of streams that is changed."""

    def _exchange(self, xs, i):
        return super()._exchange(xs, i) + 1


def share(model: nn.Module) -> None:
    modules = model.stage4
    modules[1].branches[0] = modules[0].branches[0]


def set_forward(model: nn.Module) -> None:
    forward = model.forward
    model.forward = lambda x: forward(x)


BLOCK = 'stage3.0.branches.1.0'
CHANGES = {
    'hook, block': hook(BLOCK),
    'hook, qkv': hook(f'{BLOCK}.attn.qkv'),
    'hook, stage': hook('stage4'),
    'hook, module': hook('stage4.0'),
    'hook, exchange': hook('stage4.0.fuse_layers.1.0.0.0'),
    'hook, transition': hook('transition1.0.2'),
    'LoRA': replace(f'{BLOCK}.attn.proj', LowRank),
    'normalization, block': replace(f'{BLOCK}.ffn.norm2', lambda m: nn.InstanceNorm2d(60)),
    'normalization, transition': replace('transition1.0.1', lambda m: nn.GroupNorm(2, 22)),
    'exchange': lambda model: setattr(model.stage4[0], '__class__', OtherModule),
    'activation': replace('stage2.0.relu', lambda m: nn.Sigmoid()),  # makes zeros something else
    'grouped': replace(
        'stage2.0.fuse_layers.0.1.0', lambda m: nn.Conv2d(30, 22, 1, groups=2, bias=False)
    ),
    'shared': share,
    'forward': set_forward,
}


@pytest.mark.parametrize('change', CHANGES)
def test_nothing_is_padded_in_a_backbone_that_is_not_plain(pad, change):
    model = make_backbone()
    CHANGES[change](model)
    plain, padded = fuse_for_inference(model.eval()), pad(model)
    assert not is_padded(padded)
    shapes = [parameter.shape for parameter in plain.parameters()]
    assert [parameter.shape for parameter in padded.parameters()] == shapes
    assert_equal(plain, padded, golden.image((1, 3, 64, 64)), 0)


def test_hooks_of_the_stem_make_no_difference(pad):
    model = make_backbone()
    hook('layer1')(model)
    padded = pad(model)
    assert is_padded(padded)
    assert_equal(model, padded, golden.image((1, 3, 64, 64)))


@pytest.mark.parametrize('part', ['norm1', 'attn', 'ffn.fc1'])
def test_what_is_done_to_a_padded_block_is_noticed(pad, part):
    padded, x = pad(make_backbone()), golden.image((1, 3, 64, 64))
    block = padded.get_submodule(BLOCK)
    assert type(block) is FusedBlock
    assert block.is_intact()
    before = padded(x)[0]
    block.get_submodule(part).register_forward_hook(lambda module, args, out: 2 * out)
    assert not block.is_intact()
    assert not torch.allclose(padded(x)[0], before, rtol=1e-3)


@pytest.mark.parametrize('way', ['deepcopy', 'pickle', 'state_dict'])
def test_padded_models_can_be_copied_and_saved(pad, way):
    padded = pad(make_backbone())
    if way == 'deepcopy':
        other = copy.deepcopy(padded)
    elif way == 'pickle':
        other = pickle.loads(pickle.dumps(padded))
    else:
        other = pad(HRFormer(arch=ARCH, window_size=5))
        other.load_state_dict(padded.state_dict(), strict=True)
    assert_equal(padded, other, golden.image((1, 3, 64, 64)), 0)


@pytest.mark.slow
def test_compiled_models(pad):
    padded = pad(make_backbone())
    assert_equal(padded, torch.compile(padded, backend='eager'), golden.image((1, 3, 64, 64)))


@can_compile_blocks
def test_compiled_blocks(pad):
    padded = pad(make_backbone())
    compiled = compile_blocks(copy.deepcopy(padded), backend='eager')
    assert_equal(padded, compiled, golden.image((1, 3, 64, 64)))


def test_autocast(pad):
    model, x = make_backbone(), golden.image((1, 3, 64, 64))
    plain, padded = fuse_for_inference(model), pad(model)
    with torch.autocast('cpu', torch.bfloat16):
        assert_equal(plain, padded, x, 0.05)


@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_images_can_be_mapped_over(pad):
    padded, x = pad(make_backbone()), golden.image((3, 3, 97, 161))
    outs = torch.func.vmap(lambda image: padded(image[None])[0][0])(x)
    torch.testing.assert_close(outs, padded(x)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
def test_traced_models(pad):
    padded, x = pad(make_backbone(out_indices=(0,))), golden.image((1, 3, 64, 64))
    assert_equal(padded, torch.jit.trace(padded, x, check_trace=False), x)

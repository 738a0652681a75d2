"""Modules in :mod:`mmhrformer.ops.kernels`: results, calls and memory for the backward pass."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from triton_on_cpu import make_tiles_small

from mmhrformer import HRFormerBlock, fuse_for_inference, ops
from mmhrformer.deploy.fuse import ConvGELU, FusedBlock, pad_layers
from mmhrformer.models.attention import LocalWindowSelfAttention
from mmhrformer.models.ffn import DepthwiseConv2d, DWConvFFN
from mmhrformer.ops import kernels
from mmhrformer.ops.recompute import recompute
from mmhrformer.ops.triton_support import why_not

if reason := why_not(torch.device('cpu')):
    pytest.skip(reason, allow_module_level=True)

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    make_tiles_small(monkeypatch)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the kernels that were called."""
    from mmhrformer.ops import (
        triton_attention,
        triton_conv,
        triton_ffn,
        triton_linear,
        triton_norm,
    )

    seen = []
    names = {
        kernels: ('folded_block',),
        triton_attention: ('attention_forward',),
        triton_conv: ('depthwise_forward',),
        triton_linear: ('linear_forward',),
        triton_ffn: ('convolve', 'normalize'),
        triton_norm: ('normalize_gelu', 'batch_statistics'),
    }
    for module, name in [(m, name) for m in names for name in names[m]]:
        function = getattr(module, name)

        def spy(*args, _name=name, _function=function, **options):
            seen.append(_name)
            return _function(*args, **options)

        spy.function = spy
        monkeypatch.setattr(module, name, spy)
    return seen


@pytest.fixture
def linear_kernel(monkeypatch) -> None:
    """Linear layers in float32, too, in which they are right, but were not measured."""
    monkeypatch.setattr(kernels, 'LINEAR_DTYPES', kernels.DTYPES)


def fill(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give weights and running statistics values that matter."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator)
            tensor.data.copy_(0.5 + values if tensor.dim() == 1 else 0.6 * values - 0.3)
    return module.to(dtype)


def make(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad)


def differentiate(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The result and its gradients."""
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


def run(backend: str, function, x: Tensor, module: nn.Module) -> list[Tensor]:
    """The result, gradients and running statistics, by a copy of the module."""
    module = copy.deepcopy(module)
    with ops.use(backend):
        out = function(x, module)
    return [*differentiate(out, [x, *module.parameters()]), *module.buffers()]


def check(function, x: Tensor, module: nn.Module, bound: float = 1e-4) -> None:
    results = (run(backend, function, x, module) for backend in ('kernels', 'reference'))
    for ours, plain in zip(*results):
        assert ours.dtype == plain.dtype
        scale = plain.abs().max().clamp(min=1)
        torch.testing.assert_close(ours / scale, plain / scale, atol=bound, rtol=bound)


# ------------------------------------------------------------------------------------ attention

ATTENTIONS = [
    # Map, heads, channels of a head, window.
    ((1, 8, 7), 2, 39, 7, dict()),
    ((2, 7, 5), 1, 32, 7, dict(pad_mask=True)),
    ((1, 4, 9), 1, 39, 13, dict(pad_mask=True, with_rpe=False)),
    ((1, 5, 14), 1, 32, 13, dict(with_rpe=False)),
]


def call(x: Tensor, module: nn.Module) -> Tensor:
    return module(x)


@pytest.mark.parametrize(('size', 'heads', 'head_dim', 'window', 'options'), ATTENTIONS, ids=str)
def test_attention_of_the_module(calls, size, heads, head_dim, window, options):
    attn = fill(LocalWindowSelfAttention(heads * head_dim, heads, window, **options))
    x = make(*size, heads * head_dim, grad=False)
    if window == 7:  # a map that is contiguous as (B, C, H, W)
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    check(call, x.requires_grad_(), attn)
    assert calls == ['attention_forward']


class LoRA(nn.Module):
    """A projection and something learned beside it, as PEFT makes of one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.beside = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.beside(x)


@pytest.mark.parametrize('name', ['qkv', 'proj'])
@pytest.mark.parametrize('channels', [32, 39])
def test_projections_that_are_more_than_that_are_called(calls, name, channels):
    attn = LocalWindowSelfAttention(channels, 1, 7)
    setattr(attn, name, LoRA(getattr(attn, name)))
    check(call, make(1, 4, 9, channels), fill(attn))
    hooked = LocalWindowSelfAttention(channels, 1, 7)
    getattr(hooked, name).register_forward_hook(lambda module, args, out: 2 * out)
    check(call, make(1, 4, 9, channels), fill(hooked))
    # What padding is projected to is known of a plain projection only.
    assert calls == ([] if name == 'qkv' else 2 * ['attention_forward'])


def test_attention_that_no_kernel_computes(calls):
    for channels, heads, window, dtype in (
        (8, 1, 3, torch.float64),
        (8, 1, 16, torch.float32),
        (72, 1, 3, torch.float32),
    ):
        attn = fill(LocalWindowSelfAttention(channels, heads, window), dtype)
        check(call, make(1, 4, 5, channels, dtype=dtype), attn)
    no_bias = LocalWindowSelfAttention(8, 1, 3)
    no_bias.qkv.bias = None
    check(call, make(1, 4, 5, 8), fill(no_bias))
    assert calls == []


def autocast(x: Tensor, module: nn.Module) -> Tensor:
    with torch.autocast('cpu', torch.float16):
        return module(x)


def test_autocast_decides_about_the_data_type(calls):
    check(autocast, make(1, 5, 4, 39), fill(LocalWindowSelfAttention(39, 1, 7)), bound=1e-2)
    for stride in (1, 2):
        check(autocast, make(2, 6, 5, 4), fill(DepthwiseConv2d(6, stride)), bound=1e-2)
    assert calls == ['attention_forward', *2 * ['depthwise_forward']]


# ---------------------------------------------------------------------------- stochastic depth


@pytest.mark.parametrize(
    'drop', [DropPath(0.4), DropPath(0.4).eval(), DropPath(0.0), nn.Identity()]
)
def test_paths_are_dropped_as_mmcv_does(drop):
    x, path = make(16, 2, 3, 4), make(16, 2, 3, 5)[..., :4]
    results = []
    for backend in ('kernels', 'reference'):
        torch.manual_seed(3)
        with ops.use(backend):
            out = ops.add_path(x, path, drop)
        results.append([*differentiate(out, [x, path]), torch.rand(1)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_hooks_on_what_drops_paths_are_called():
    drop = DropPath(0.4)
    drop.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    x = make(2, 2, 3, 4)
    with ops.use('kernels'):
        assert torch.equal(ops.add_path(x, x, drop), x)


# ------------------------------------------------------------------------------- normalization

NORMS = {
    'training': lambda: nn.BatchNorm2d(6),
    'average': lambda: nn.BatchNorm2d(6, momentum=None),
    'evaluation': lambda: nn.BatchNorm2d(6).eval(),
    'no running': lambda: nn.BatchNorm2d(6, track_running_stats=False),
    'no running, evaluation': lambda: nn.BatchNorm2d(6, track_running_stats=False).eval(),
    'one process': lambda: nn.SyncBatchNorm(6),
    'one process, evaluation': lambda: nn.SyncBatchNorm(6).eval(),
}


def two_steps(x: Tensor, parts: nn.ModuleList) -> Tensor:
    """Twice: what a first step leaves in the running statistics is averaged with the second's."""
    norm, conv = parts
    if ops.backend(x) is not kernels:
        norm = parts[0] = revert_sync_batchnorm(norm)  # torch's knows GPUs only
    ops.norm_gelu_conv(x, norm, conv)
    return ops.norm_gelu_conv(2 * x, norm, conv)


@pytest.mark.parametrize('name', NORMS)
def test_normalization_of_every_kind(calls, name):
    for conv, memory_format in zip((nn.Conv2d(6, 4, 1), DepthwiseConv2d(6)), FORMATS):
        x = make(2, 6, 3, 4, grad=False).contiguous(memory_format=memory_format)
        check(two_steps, x.requires_grad_(), fill(nn.ModuleList([NORMS[name](), conv])))
    of_map = 'evaluation' not in name or 'no running' in name
    assert ('batch_statistics' in calls) == of_map
    assert 'normalize_gelu' in calls


def in_recompute(x: Tensor, parts: nn.ModuleList) -> Tensor:
    return recompute(parts, lambda x: ops.norm_gelu_conv(x, *parts), x)


def test_statistics_are_updated_once_where_a_block_is_recomputed(calls):
    for norm in ('training', 'average'):
        parts = fill(nn.ModuleList([NORMS[norm](), nn.Conv2d(6, 4, 1)]))
        check(in_recompute, make(3, 6, 5, 4), parts)
    assert calls.count('batch_statistics') == 4  # in both passes, unlike without recompute()


@pytest.mark.parametrize('conv', [nn.Conv2d(6, 4, 1), DepthwiseConv2d(6), None])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d(6), nn.BatchNorm2d(6).eval()])
def test_the_input_alone_is_kept(norm, conv):
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = make(4, 6, 16, 16)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    with ops.use('kernels'), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = ops.norm_gelu_conv(x, norm, conv)
    channels = 6 * 4 * 10  # of statistics and parameters
    assert x.nbytes <= sum(kept.values()) <= x.nbytes + channels
    assert out.requires_grad


def test_a_process_without_images_communicates_as_the_others(calls, monkeypatch, tmp_path):
    dist.init_process_group('gloo', f'file://{tmp_path}/meet', rank=0, world_size=1)
    try:
        with ops.use('kernels'):
            x = make(0, 6, 3, 4)
            ops.norm_gelu_conv(x, nn.BatchNorm2d(6), None)
            assert calls == []
            monkeypatch.setattr(kernels, 'sync_group', lambda norm: dist.group.WORLD)
            ops.norm_gelu_conv(x, nn.BatchNorm2d(6), None).sum().backward()
        assert calls == ['batch_statistics', 'normalize_gelu']
    finally:
        dist.destroy_process_group()


def test_normalization_that_no_kernel_computes(calls):
    double = nn.ModuleList([nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)])
    check(two_steps, make(2, 6, 4, 3, dtype=torch.float64), fill(double, torch.float64))
    hooked = nn.BatchNorm2d(6)
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    for norm in (hooked, nn.BatchNorm2d(6, affine=False), nn.GroupNorm(2, 6)):
        check(two_steps, make(2, 6, 4, 3), fill(nn.ModuleList([norm, nn.Conv2d(6, 4, 1)])))
    assert calls == []


# ------------------------------------------------------------------------------------------ FFN


def hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, out: 2 * out)
    return module


class Doubled(nn.Module):
    """Something in the place of a part, with nothing that the kernels read."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.part(x)


def dilate(conv: nn.Conv2d) -> nn.Conv2d:
    """Change a convolution as code that enlarges fields of view does."""
    conv.dilation = conv.padding = (2, 2)
    return conv


def make_ffn(kind: str = 'training') -> DWConvFFN:
    """An FFN of 6 channels whose normalizations are of a kind."""
    ffn = DWConvFFN(6, 10)
    for name, channels in (('norm1', 10), ('norm2', 10), ('norm3', 6)):
        norm = NORMS[kind]()
        options = dict(momentum=norm.momentum, track_running_stats=norm.track_running_stats)
        setattr(ffn, name, type(norm)(channels, **options).train(norm.training))
    return fill(ffn)


def differences(x: Tensor, ffn: DWConvFFN, function=call) -> list[float]:
    """Relative errors of result, gradients and buffers, against the reference in float64."""
    exact = revert_sync_batchnorm(copy.deepcopy(ffn)).double()
    exact = run('reference', call, x.detach().double().requires_grad_(), exact)
    pairs = ((a.double(), b.double()) for a, b in zip(run('kernels', function, x, ffn), exact))
    return [((ours - plain).norm() / plain.norm().clamp(min=1)).item() for ours, plain in pairs]


@pytest.mark.parametrize('kind', ['training', 'average', 'evaluation', 'no running', 'one process'])
def test_ffn_of_every_normalization(calls, linear_kernel, kind):
    assert max(differences(make(2, 3, 4, 6), make_ffn(kind))) < 1e-5
    assert calls.count('convolve') == calls.count('normalize') == 3  # in both passes


def test_ffn_that_is_recomputed(linear_kernel):
    def recomputed(x: Tensor, module: nn.Module) -> Tensor:
        return recompute(module, module, x)

    assert max(differences(make(2, 3, 4, 6), make_ffn(), recomputed)) < 1e-5


@pytest.mark.parametrize('frozen', [True, False])
def test_ffn_in_autocast(calls, frozen):
    x, ffn = make(2, 3, 4, 6, grad=not frozen), make_ffn()
    results = []
    for backend in ('kernels', 'reference'):
        with ops.use(backend), torch.autocast('cpu', torch.float16):
            out = ffn(x)
        leaves = [*ffn.parameters()] if frozen else [x, *ffn.parameters()]
        results.append(differentiate(out, leaves))
    for ours, plain in zip(*results):
        assert ours.dtype == plain.dtype
        scale = plain.abs().max().clamp(min=1)
        torch.testing.assert_close(ours / scale, plain / scale, atol=1e-2, rtol=1e-2)
    assert calls.count('convolve') == 3


def test_ffn_of_several_processes(monkeypatch, linear_kernel, tmp_path):
    """One, which exchanges what several would; gradients of biases are no zeros of their own."""
    dist.init_process_group('gloo', f'file://{tmp_path}/meet', rank=0, world_size=1)
    try:
        monkeypatch.setattr(kernels, 'sync_group', lambda norm: dist.group.WORLD)
        assert max(differences(make(2, 3, 4, 6), make_ffn())) < 1e-5
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('part', ['norm', 'norm and conv', 'ffn'])
def test_maps_that_hooks_restore_in_another_format(linear_kernel, part):
    """As save_on_cpu and activation offloading do."""
    ffn, x = make_ffn(), make(2, 6, 5, 4)
    conv = None if part == 'norm' else DepthwiseConv2d(6)
    module = ffn if part == 'ffn' else nn.ModuleList([ffn.norm3, *filter(None, [conv])])
    results = []
    for unpack in (lambda tensor: tensor, lambda tensor: tensor.clone(memory_format=FORMATS[0])):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            y = x.to(memory_format=torch.channels_last)
            with ops.use('kernels'):
                if part == 'ffn':
                    out = ffn(y.permute(0, 2, 3, 1))
                else:
                    out = ops.norm_gelu_conv(y, *module)
            results.append(differentiate(out, [x, *module.parameters()]))
    torch.testing.assert_close(*results)


def test_ffn_keeps_the_inputs_of_convolutions_and_normalizations(linear_kernel):
    kept, (B, H, W), ffn = [], (2, 16, 16), make_ffn()
    x = make(B, H, W, 6)
    with ops.use('kernels'), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        ffn(x)
    sizes = sorted(tensor.numel() for tensor in kept if tensor.numel() >= x.numel())
    assert sizes == [B * H * W * channels for channels in (6, 6, 10, 10)]


def test_ffn_has_the_same_gradients_each_time_and_no_second_ones(linear_kernel):
    x, ffn = make(2, 3, 4, 6), make_ffn()
    first, again = (run('kernels', call, x, ffn) for _ in range(2))
    assert all(map(torch.equal, first, again))
    # Normalization takes away what these add, so that they are zero, not what rounding leaves.
    of = dict(zip(['x', *dict(ffn.named_parameters())], first[1:]))
    assert not of['fc1.bias'].any()
    assert not of['fc2.bias'].any()
    with pytest.raises(RuntimeError, match=r'no second derivatives.* MMHRFORMER_OPS=reference'):
        second_derivative('kernels', x, ffn)


def test_ffn_that_is_none_for_the_kernels(linear_kernel, monkeypatch):
    x = make(2, 3, 4, 6)
    with ops.use('kernels'):
        assert ops.has_conv_ffn(x, make_ffn())
        for name in ('fc1', 'dw3x3', 'fc2', 'norm1', 'norm2', 'norm3'):
            for change in (hook, Doubled):
                ffn = make_ffn()
                setattr(ffn, name, change(getattr(ffn, name)))
                assert not ops.has_conv_ffn(x, ffn)
        for name, other in (
            ('fc1', nn.Conv2d(6, 10, 3, padding=1)),
            ('fc1', nn.Conv2d(6, 10, 1, padding=1)),
            ('fc1', nn.Conv2d(5, 10, 1)),
            ('fc2', nn.Conv2d(10, 6, 1, bias=False)),
            ('fc2', nn.Conv2d(10, 6, 1, groups=2)),
            ('dw3x3', nn.Conv2d(10, 10, 3, padding=1, groups=10)),
            ('dw3x3', dilate(DepthwiseConv2d(10))),
            ('norm1', nn.BatchNorm2d(9)),
            ('norm2', nn.GroupNorm(2, 10)),
            ('norm3', nn.BatchNorm2d(6, affine=False)),
        ):
            ffn = make_ffn()
            setattr(ffn, name, other)
            assert not ops.has_conv_ffn(x, ffn)
        assert not ops.has_conv_ffn(x[:0], make_ffn())
        assert not ops.has_conv_ffn(x.double(), make_ffn().double())
        with torch.no_grad():
            assert not ops.has_conv_ffn(x, make_ffn())
        monkeypatch.undo()  # in float32, products are left to cuDNN
        assert not ops.has_conv_ffn(x, make_ffn())
    assert not ops.has_conv_ffn(x, make_ffn())


# ---------------------------------------------------------------------------- other derivatives


def second_derivative(backend: str, x: Tensor, module: nn.Module) -> Tensor:
    with ops.use(backend):
        out = module(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


@pytest.mark.parametrize('module', [LocalWindowSelfAttention(6, 1, 3), DepthwiseConv2d(6)])
def test_second_derivatives_are_refused(module):
    with pytest.raises(RuntimeError, match=r'no second derivatives.* MMHRFORMER_OPS=reference'):
        second_derivative('kernels', make(1, 6, 3, 6), module)


def test_second_derivatives_of_a_strided_convolution_are_right():
    conv = fill(DepthwiseConv2d(6, stride=2))
    ours, plain = (
        second_derivative(backend, make(1, 6, 3, 4), conv) for backend in ('kernels', 'reference')
    )
    torch.testing.assert_close(ours, plain)


# -------------------------------------------------------------------------------------- threads


def test_another_thread_recomputes_in_the_backend_of_the_forward_pass(calls):
    x, norm, conv = make(2, 6, 4, 3), nn.BatchNorm2d(6), DepthwiseConv2d(6)
    with ops.use('kernels'):
        loss = ops.norm_gelu_conv(x, norm, conv).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert x.grad is not None
    again = ['normalize_gelu', 'depthwise_forward']
    assert calls == ['batch_statistics', *again, *again]


class Colder(LocalWindowSelfAttention):
    """Another bias, and the forward function of its base."""

    def attention_bias(self, size: tuple[int, int], qkv: Tensor) -> Tensor:
        return super().attention_bias(size, qkv) - qkv.sum(dim=(2, 4)).mT[:, :, None].to(qkv.dtype)


def test_attention_that_is_changed_by_a_subclass(calls):
    attn, x = fill(Colder(32, 2, window_size=3)), make(1, 4, 5, 32)
    outs = []
    for backend in ('kernels', 'reference'):
        with ops.use(backend):
            outs.append(attn(x))
    torch.testing.assert_close(*outs)
    assert 'attention_forward' not in calls


def test_a_depthwise_convolution_of_any_stride():
    tensors = make(1, 6, 7, 8), make(6, 1, 3, 3), make(6)
    with ops.use('kernels'):
        ours = ops.depthwise_conv(*tensors, stride=3)
    torch.testing.assert_close(ours, nn.functional.conv2d(*tensors, 3, 1, groups=6))


# ------------------------------------------------------------------------------- folded blocks


def fold(channels: int, heads: int, dtype: torch.dtype = torch.float32, **options) -> FusedBlock:
    """A folded block, for GPUs."""
    block = fill(HRFormerBlock(channels, heads, mlp_ratio=2, **options).eval())
    with ops.use('cuda'):
        return fuse_for_inference(block).to(dtype)


def test_products_of_float32_are_left_to_cublas(calls):
    with ops.use('kernels'), torch.no_grad():
        fold(32, 1)(make(1, 5, 4, 32, grad=False))
    assert calls == ['attention_forward', 'depthwise_forward']


LINEAR = 'linear_forward'
SIX = [LINEAR, 'attention_forward', LINEAR, LINEAR, 'depthwise_forward', LINEAR]


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float32, 1e-4), (torch.float16, 1e-2)])
@pytest.mark.parametrize(
    ('channels', 'options'), [(32, dict(with_rpe=False)), (78, dict()), (128, dict())]
)
def test_folded_block(calls, linear_kernel, channels, options, dtype, bound):
    block = fold(channels, channels // 32, dtype, **options)
    x = make(1, 3, 8, channels, dtype=dtype, grad=False)
    if channels == 32:  # a map that is contiguous as (B, C, H, W)
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    outs = []
    for backend in ('kernels', 'reference'):
        with ops.use(backend), torch.no_grad():
            outs.append(block(x))
    ours, plain = outs
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, plain, atol=bound * plain.abs().max().item(), rtol=bound)
    assert calls == ['folded_block', *SIX]


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float32, 1e-4), (torch.float16, 1e-2)])
@pytest.mark.parametrize('channels', [22, 100])
def test_padded_block(calls, linear_kernel, channels, dtype, bound):
    """22 channels are padded to 24, 44 in the FFN to 48; 100 to 104, too wide for one kernel."""
    block, x = fold(channels, 2, dtype), make(1, 3, 8, channels, dtype=dtype, grad=False)
    missing = kernels.channel_padding(channels)
    with ops.use('reference'), torch.no_grad():
        plain = block(x)
        pad_layers(list(block.modules()), kernels.channel_padding)
        padded = block(F.pad(x, (0, missing)))
    with ops.use('kernels'), torch.no_grad():
        ours = block(F.pad(x, (0, missing)))
    assert calls == ['folded_block', *SIX]
    for out in (ours, padded):
        assert out.shape == (1, 3, 8, channels + missing)
        assert not out[..., channels:].any()
        torch.testing.assert_close(
            out[..., :channels], plain, atol=bound * plain.abs().max().item(), rtol=bound
        )


PARTS = [
    'norm1',
    'norm2',
    'attn',
    'attn.qkv',
    'attn.proj',
    'ffn',
    'ffn.fc1',
    'ffn.dw3x3',
    'ffn.fc2',
]


@pytest.mark.parametrize('name', PARTS)
def test_parts_that_are_more_than_that_are_called(calls, linear_kernel, name):
    x = make(1, 5, 4, 32, grad=False)
    parent, _, last = name.rpartition('.')
    for change in (hook, Doubled):
        block = fold(32, 1)
        with ops.use('reference'), torch.no_grad():
            untouched = block(x)
        setattr(block.get_submodule(parent), last, change(block.get_submodule(name)))
        outs = []
        for backend in ('kernels', 'reference'):
            with ops.use(backend), torch.no_grad():
                outs.append(block(x))
        torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(outs[0], untouched, atol=1e-3)
    assert 'folded_block' not in calls


def test_folded_blocks_of_other_shapes(calls, linear_kernel):
    """Kernels would read weights of other shapes wrongly, and beyond their ends."""
    x = make(1, 5, 4, 32, grad=False)
    for name, conv in (
        ('dw3x3', nn.Conv2d(64, 64, 3, padding=2, dilation=2, groups=64)),
        ('dw3x3', nn.Conv2d(64, 64, 3, padding=1)),
        ('fc2', nn.Conv2d(64, 32, 1, groups=2)),
    ):
        block = fold(32, 1)
        setattr(block.ffn, name, ConvGELU(fill(conv).requires_grad_(False)))
        outs = []
        for backend in ('kernels', 'reference'):
            with ops.use(backend), torch.no_grad():
                outs.append(block(x))
        torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
    block = fold(32, 1)
    block.attn.proj = nn.Linear(40, 32)
    for broken, of in ((block, x), (fold(32, 1), F.pad(x, (0, 8)))):
        with ops.use('kernels'), torch.no_grad(), pytest.raises(RuntimeError, match='shape'):
            broken(of)
    assert 'folded_block' not in calls


def test_folded_blocks_that_no_kernels_compute(calls, linear_kernel):
    block, x = fold(32, 1), make(1, 5, 4, 32)
    with ops.use('kernels'):
        (grad,) = torch.autograd.grad(block(x).sum(), x)
        with torch.no_grad():
            assert fold(32, 1, torch.float64)(x.double()).dtype == torch.float64
            assert fold(32, 1, window_size=16)(x).shape == x.shape
            with torch.autocast('cpu', torch.float16):
                assert block(x).shape == x.shape
    with ops.use('reference'):
        (plain,) = torch.autograd.grad(block(x).sum(), x)
    torch.testing.assert_close(grad, plain, atol=1e-4, rtol=1e-4)
    assert 'folded_block' not in calls

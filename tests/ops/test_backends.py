"""Every backend gives the results of the reference for every operator, including gradients."""

from __future__ import annotations

import contextlib
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from triton_on_cpu import KERNELS_ON_CPU, make_tiles_small

from mmhrformer import ops
from mmhrformer.models.ffn import DepthwiseConv2d
from mmhrformer.ops import compiled, cpu, cuda, dispatch, kernels, reference
from mmhrformer.ops.recompute import recompute

BACKENDS = ['compiled', 'cpu', 'cuda', *['kernels'] * KERNELS_ON_CPU]
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    if KERNELS_ON_CPU:
        make_tiles_small(monkeypatch)


def run(backend: str, function, *tensors: Tensor) -> list[Tensor]:
    """The result, and the gradients of what requires one."""
    leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    with ops.use(backend):
        out = function(*tensors)
    # The gradient that arrives has a memory format of its own.
    weight = (
        torch.linspace(-1, 1, out.numel(), dtype=out.dtype)
        .view(out.shape[::-1])
        .permute(*reversed(range(out.dim())))
    )
    grads = torch.autograd.grad((out * weight).sum(), leaves) if out.requires_grad else ()
    return [out, *grads]


def check(backend: str, dtype: torch.dtype, function, *tensors: Tensor) -> Tensor:
    bound = DTYPES[dtype]
    results = run(backend, function, *tensors)
    for ours, plain in zip(results, run('reference', function, *tensors)):
        assert ours.dtype == plain.dtype
        scale = plain.abs().max().clamp(min=1)
        torch.testing.assert_close(ours / scale, plain / scale, atol=bound, rtol=bound)
    return results[0]


def make(*shape: int, dtype: torch.dtype, grad: bool) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return tensor.requires_grad_(grad)


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('backend', BACKENDS)
def test_window_attention(backend, dtype, grad, monkeypatch):
    monkeypatch.setattr(cuda, 'MAX_WINDOWS', 3)
    for windows, side, heads, head_dim in (
        (4, 1, 1, 8),
        (4, 3, 2, 18),
        (8, 2, 3, 39),
        (2, 7, 1, 4),
    ):
        N = side * side
        qkv = make(windows, N, 3, heads, head_dim, dtype=dtype, grad=grad)
        for shape in (None, (1, heads, N, N), (windows, heads, N, N), (windows, 1, 1, N)):
            bias = None if shape is None else make(*shape, dtype=dtype, grad=grad)
            check(backend, dtype, lambda q, b: ops.window_attention(q, b, 0.3), qkv, bias)


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('backend', BACKENDS)
def test_depthwise_conv(backend, dtype, grad):
    for size in ((1, 3), (2, 7), (5, 4)):
        for memory_format in FORMATS:
            x = make(2, 6, *size, dtype=dtype, grad=False).contiguous(memory_format=memory_format)
            weight, bias = make(6, 1, 3, 3, dtype=dtype, grad=grad), make(6, dtype=dtype, grad=grad)
            weight = weight.detach().to(memory_format=memory_format).requires_grad_(grad)
            for stride in (1, 2):
                tensors = x.requires_grad_(grad), weight, bias
                function = lambda *args, s=stride: ops.depthwise_conv(*args, s)  # noqa: E731
                out = check(backend, dtype, function, *tensors)
                assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('backend', BACKENDS)
def test_layer_norm(backend, dtype):
    for norm in (nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False), nn.Identity()):
        tensors = make(3, 5, 4, 6, dtype=dtype, grad=True), *norm.to(dtype).parameters()
        check(backend, dtype, lambda x, *_, n=norm: ops.fork_layer_norm(x, n)[0], *tensors)


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('backend', BACKENDS)
def test_norm_gelu_conv(backend, dtype, memory_format):
    torch.manual_seed(0)
    for norm in (nn.BatchNorm2d(6), nn.BatchNorm2d(6).eval(), nn.GroupNorm(3, 6), nn.Identity()):
        for conv in (nn.Conv2d(6, 4, 1), DepthwiseConv2d(6), None):
            modules = nn.ModuleList(m for m in (norm, conv) if m is not None).to(dtype)
            x = make(2, 6, 3, 4, dtype=dtype, grad=False).contiguous(memory_format=memory_format)
            tensors = x.requires_grad_(), *modules.parameters()
            function = lambda x, *_, n=norm, c=conv: ops.norm_gelu_conv(x, n, c)  # noqa: E731
            check(backend, dtype, function, *tensors)
            before = x.detach().clone()
            with torch.no_grad():
                check(backend, dtype, function, *tensors)
            assert torch.equal(x, before)


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('backend', BACKENDS)
def test_pointwise_conv(backend, dtype, memory_format):
    x = make(2, 6, 5, 4, dtype=dtype, grad=False).contiguous(memory_format=memory_format)
    weight, bias = make(4, 6, 1, 1, dtype=dtype, grad=True), make(4, dtype=dtype, grad=True)
    for offset in (bias, None):
        check(backend, dtype, ops.pointwise_conv, x.requires_grad_(), weight, offset)
    assert ops.pointwise_conv(x, weight, bias).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('backend', BACKENDS)
def test_conv_gelu(backend, dtype, grad, memory_format):
    torch.manual_seed(0)
    for conv in (nn.Conv2d(6, 4, 1), DepthwiseConv2d(6, bias=False), nn.Conv2d(6, 4, 3, stride=2)):
        conv = conv.to(dtype).requires_grad_(grad)
        x = make(3, 6, 5, 4, dtype=dtype, grad=False).contiguous(memory_format=memory_format)
        x.requires_grad_(grad)
        check(backend, dtype, lambda x, *_, c=conv: ops.conv_gelu(x, c), x, *conv.parameters())


def test_fused_convolution_needs_onednn_that_keeps_its_activation():
    """Earlier versions read it after it was freed, which crashed folded models."""
    (found,) = re.findall(r'MKL-DNN v(\d+)\.(\d+)', torch.__config__.show())
    assert (cpu.ONEDNN_CONVOLUTION is not None) == (tuple(map(int, found)) >= (3, 4))


@pytest.mark.parametrize('backend', [*BACKENDS, 'reference'])
def test_autocast_decides_about_the_data_type(backend):
    x = make(2, 6, 5, 4, dtype=torch.float32, grad=True)
    conv = DepthwiseConv2d(6)
    for function in (lambda: conv(x), lambda: ops.conv_gelu(x, conv)):
        with ops.use(backend), torch.autocast('cpu', torch.bfloat16):
            out = function()
        assert out.dtype == torch.bfloat16
        (grad,) = torch.autograd.grad(out.float().sum(), conv.weight)
        assert grad.dtype == torch.float32


@pytest.mark.parametrize(('backend', 'padding'), [('cpu', (0, 0, 1, 0)), ('cuda', (6, 0, 1, 4))])
def test_zeros_that_are_appended_to_a_head(backend, padding):
    with ops.use(backend):
        head_padding = ops.backend(torch.zeros(1)).head_padding
    assert tuple(map(head_padding, (18, 32, 39, 4))) == padding


@pytest.mark.parametrize(
    ('backend', 'padding'), [('kernels', (0, 4, 2, 4, 0)), ('cuda', 5 * (0,)), ('cpu', 5 * (0,))]
)
def test_zeros_that_are_appended_to_maps(backend, padding):
    assert tuple(map(dispatch.BACKENDS[backend].channel_padding, (18, 36, 78, 156, 312))) == padding


def test_gelu_is_right_whatever_the_memory_formats():
    """torch 2.1's is not, on CPUs: contiguous input, gradient of another format."""
    x = make(2, 6, 9, 7, dtype=torch.float32, grad=True)
    arriving = make(2, 9, 7, 6, dtype=torch.float32, grad=False).permute(0, 3, 1, 2)
    (ours,) = torch.autograd.grad(reference.gelu(x), x, arriving)
    double = x.detach().double().requires_grad_()
    (plain,) = torch.autograd.grad(torch.nn.functional.gelu(double), double, arriving.double())
    torch.testing.assert_close(ours.double(), plain, atol=1e-5, rtol=1e-5)


def test_products_are_scaled_before_they_are_too_large(monkeypatch):
    """For ONNX files, which may be converted to float16, and in float16 where torch supports it."""
    largest = torch.finfo(torch.float32).max
    qkv = torch.full((1, 4, 3, 1, 32), 1.5 * (largest / 32) ** 0.5)  # products of 2.25 x largest
    assert not reference.window_attention(qkv, None, 32**-0.5).isfinite().all()
    monkeypatch.setattr(torch.onnx, 'is_in_onnx_export', lambda: True)
    for bias in (None, torch.zeros(1, 1, 4, 4)):
        out = reference.window_attention(qkv, bias, 32**-0.5)
        torch.testing.assert_close(out, qkv[:, :, 2, 0])


def test_the_reference_is_used_where_operators_are_watched():
    x = torch.zeros(1)
    assert ops.backend(x).__name__ == 'mmhrformer.ops.cpu'
    assert ops.backend(x.to('meta')) is reference
    seen = []
    torch.func.vmap(lambda z: (seen.append(ops.backend(z)), z)[1])(x)
    torch.func.jvp(lambda z: (seen.append(ops.backend(z)), z)[1], (x,), (x,))
    torch.jit.trace(lambda z: (seen.append(ops.backend(z)), z + 1)[1], x, check_trace=False)
    assert set(seen) == {reference}


def test_backends_can_be_forced(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.setenv('MMHRFORMER_OPS', 'reference')
    assert ops.backend(x) is reference
    with ops.use('cuda'):
        assert ops.backend(x) is cuda
    monkeypatch.setenv('MMHRFORMER_OPS', 'fast')
    with pytest.raises(ValueError, match=r"'fast' is not a backend .*MMHRFORMER_OPS.* one of"):
        ops.backend(x)
    with pytest.raises(ValueError, match="'fast' is not a backend"), ops.use('fast'):
        pass


def test_forced_backends_end_with_their_block():
    with contextlib.suppress(KeyError), ops.use('reference'):
        raise KeyError
    assert ops.backend(torch.zeros(1)).__name__ == 'mmhrformer.ops.cpu'


class Elsewhere:
    """A stand-in for a tensor on another device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_cuda = self.device.type == 'cuda'


def test_gpus_get_kernels_where_they_can_run(monkeypatch):
    x, reasons = Elsewhere('cuda:1'), {torch.device('cuda:1'): ''}
    monkeypatch.setattr(dispatch, 'why_not', reasons.__getitem__)
    for x.requires_grad in (True, False):
        assert ops.backend(x) is kernels
        with ops.use('reference'):
            assert ops.backend(x) is reference
    reasons[x.device] = 'Triton is not installed'
    assert ops.backend(x) is cuda
    reasons[x.device] = ''
    monkeypatch.setenv('MMHRFORMER_OPS', 'cuda')
    assert ops.backend(x) is cuda
    monkeypatch.delenv('MMHRFORMER_OPS')
    assert ops.backend(Elsewhere('mps')) is reference


def test_kernels_that_cannot_run_are_refused(monkeypatch):
    reason = 'Triton kernels run on GPUs, not on meta'
    monkeypatch.setattr(dispatch, 'why_not', lambda device: reason if device.type == 'meta' else '')
    x = torch.zeros(1, device='meta')
    monkeypatch.setenv('MMHRFORMER_OPS', 'kernels')
    with pytest.raises(
        ValueError, match=f'MMHRFORMER_OPS or ops.use requests the kernels, but {reason}'
    ):
        ops.backend(x)
    assert ops.backend(torch.zeros(1)) is kernels
    monkeypatch.delenv('MMHRFORMER_OPS')
    with ops.use('kernels'), pytest.raises(ValueError, match=reason):
        ops.backend(x)


def test_backends_are_forced_in_one_thread_only():
    x, inside = torch.zeros(1), threading.Barrier(2)

    def backend_of(backend: str) -> ModuleType:
        with ops.use(backend):
            inside.wait(timeout=60)  # until both are
            return ops.backend(x)

    with ThreadPoolExecutor() as threads, ops.use('compiled'):
        assert list(threads.map(backend_of, ['reference', 'cuda'])) == [reference, cuda]
        assert threads.submit(ops.backend, x).result() is cpu
        assert ops.backend(x) is compiled


def test_another_thread_recomputes_in_the_backend_of_the_forward_pass():
    """Simulates GPUs, where autograd uses a separate thread for each."""
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(ops.backend(x))
        return x.square()

    x = make(2, 3, dtype=torch.float32, grad=True)
    losses = [recompute(nn.Identity(), function, x).sum()]
    with ops.use('reference'):
        losses.append(recompute(nn.Identity(), function, x).sum())
        assert seen == [cpu, reference]
        losses[0].backward()  # nothing was forced
    with ThreadPoolExecutor() as threads:
        threads.submit(losses[1].backward).result()
    assert seen == [cpu, reference, cpu, reference]


def test_only_this_package_asks_what_is_done_with_a_computation():
    asks = re.compile(
        r'is_compiling|is_tracing|is_grad_enabled|is_in_onnx_export|is_autocast|is_cuda|device\.type'
    )
    folder = Path(ops.__file__).parents[1] / 'models'
    asking = [path.name for path in folder.rglob('*.py') if asks.search(path.read_text())]
    assert asking == []

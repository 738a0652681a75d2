"""Layer normalization in Triton."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from triton_on_cpu import DEVICE, REASON, plan_anew

if REASON:
    pytest.skip(REASON, allow_module_level=True)

from mmhrformer import ops
from mmhrformer.models.block import HRFormerBlock
from mmhrformer.ops import triton_layer_norm
from mmhrformer.ops.triton_layer_norm import layer_norm

BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
NAMES = ('output', 'gradient', 'of weight', 'of bias')
EPS = 1e-6


def make(*size: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> list[Tensor]:
    """Rows, weight, bias, and a gradient that arrives."""
    generator = torch.Generator().manual_seed(sum(size))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    C = size[-1]
    x, weight, bias = (normal(*size) + mean).to(dtype), normal(C) + 1, normal(C)
    return [tensor.to(DEVICE) for tensor in (x, weight, bias, normal(*size).to(dtype))]


def plain(x, weight, bias, eps=EPS, dtype=None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def fused(x, weight, bias, dtype=None) -> Tensor:
    return layer_norm(x, weight, bias, EPS, dtype)


def run(function, x, weight, bias, grad, **options) -> list[Tensor]:
    """Output and gradients of what there is, in the order of :data:`NAMES`."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    out = function(*inputs, **options)
    leaves = [leaf for leaf in inputs if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exact(tensors: list[Tensor | None]) -> list[Tensor]:
    return run(plain, *(None if t is None else t.double() for t in tensors))


def errors(ours: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Relative errors."""
    norms = [(a.double() - b).norm() / b.norm().clamp(min=1e-3) for a, b in zip(ours, exact)]
    return {name: norm.item() for name, norm in zip(NAMES, norms)}


def check(tensors: list[Tensor | None], bound: float, dtype: torch.dtype | None = None) -> None:
    ours = run(fused, *tensors, dtype=dtype)
    assert (ours[0].dtype, ours[1].dtype) == (dtype or tensors[0].dtype, tensors[0].dtype)
    assert all(tensor.dtype == torch.float32 for tensor in ours[2:])
    found = errors(ours, exact(tensors))
    assert max(found.values()) < bound, found


def use_launch(monkeypatch, **launch: tuple[int, int]) -> None:
    monkeypatch.setattr(triton_layer_norm, 'LAUNCH', launch)
    plan_anew(monkeypatch, triton_layer_norm)


@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize('rows', [1, 7, 1000])
@pytest.mark.parametrize('channels', [18, 32, 78, 156, 312, 1024])
def test_as_torch_in_float64(channels, rows, dtype, monkeypatch):
    if DEVICE == 'cpu' and rows == 1000:  # each program takes milliseconds
        use_launch(monkeypatch, forward=(1 << 17, 4), backward=(1 << 17, 4))
    check(make(rows, channels, dtype=dtype), BOUNDS[dtype])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_rounded_once_to_another_data_type(dtype):
    x, weight, bias, grad = make(3, 5, 78)
    check([x, weight, bias, grad.to(dtype)], BOUNDS[dtype], dtype)
    ours = fused(x, weight, bias, dtype)
    rounded = plain(x, weight, bias).to(dtype)  # all but the last bits before rounding are equal
    assert (ours != rounded).float().mean() < 0.01


@pytest.mark.parametrize('absent', [(1,), (2,), (1, 2)])
def test_without_weight_or_bias(absent):
    tensors = [None if i in absent else t for i, t in enumerate(make(9, 40))]
    check(tensors, 1e-5)


def test_rows_and_gradients_with_other_strides():
    x, weight, bias, grad = make(2, 24, 5, 36)
    check([x.transpose(1, 2), weight, bias, grad.transpose(1, 2)], 1e-5)


def test_nothing():
    out, grad, of_weight, of_bias = run(fused, *make(0, 5, 32))
    assert out.shape == grad.shape == (0, 5, 32)
    assert not of_weight.any()
    assert not of_bias.any()


def test_large_means():
    tensors = make(50, 78, mean=1000.0)
    truth = exact(tensors)
    ours, theirs = errors(run(fused, *tensors), truth), errors(run(plain, *tensors), truth)
    for name in NAMES:
        assert ours[name] < 2 * theirs[name] + 1e-5, (name, ours, theirs)


def test_small_variances():
    """Epsilon, which is added to them, is as large as they are."""
    x, *others = make(6, 78)
    check([x * EPS**0.5, *others], BOUNDS[torch.float32])


def test_constant_rows():
    x, weight, bias, grad = make(6, 78)
    out, grad_x, *_ = run(fused, torch.full_like(x, 0.1), weight, bias, grad)
    torch.testing.assert_close(out, bias.expand_as(out), atol=1e-4, rtol=0)
    assert grad_x.isfinite().all()


def test_not_a_number_is_not_hidden():
    tensors = make(7, 78)
    tensors[0][3, 77] = float('nan')
    for ours, theirs in zip(run(fused, *tensors), run(plain, *tensors)):
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.fixture
def small(monkeypatch):
    """Tiles so small, and programs so few, that the loop runs several times."""
    use_launch(monkeypatch, forward=(256, 1), backward=(256, 1))
    monkeypatch.setattr(triton_layer_norm, 'PROGRAMS', 3)


@pytest.mark.parametrize('channels', [24, 78])
def test_many_tiles(small, channels):
    check(make(61, channels), 1e-5)


def test_same_bits_each_time(small):
    tensors = make(61, 32, dtype=torch.float16)
    for one, other in zip(run(fused, *tensors), run(fused, *tensors)):
        assert torch.equal(one, other)


@pytest.mark.parametrize('wanted', [0, 1, 2])
def test_single_gradients(wanted):
    *tensors, grad = make(9, 36)
    leaf = tensors[wanted].requires_grad_()
    ours, theirs = (torch.autograd.grad(f(*tensors), leaf, grad) for f in (fused, plain))
    torch.testing.assert_close(ours, theirs)


def test_only_the_input_is_kept():
    x, weight, bias, _ = make(9, 36)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        assert fused(x.requires_grad_(), weight, bias).requires_grad
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), weight.data_ptr()]


@pytest.mark.parametrize(
    ('size', 'dtypes', 'message'),
    [
        ((2, 32), (torch.float64, None), 'x is torch.float64: choose'),
        ((2, 32), (torch.float32, torch.float64), 'dtype is torch.float64: choose'),
        ((2, 1025), (torch.float32, None), r'\(2, 1025\) has rows of more than 1024 numbers'),
    ],
)
def test_errors(size, dtypes, message):
    x, weight, bias, _ = make(*size, dtype=dtypes[0])
    with pytest.raises(ValueError, match=message):
        fused(x, weight, bias, dtypes[1])


def test_second_derivatives_are_refused():
    x, weight, bias, _ = make(9, 36)
    out = fused(x.requires_grad_(), weight, bias)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*ops\.use\('reference'\)"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_operators_know_shapes():
    x, weight, bias, grad = make(9, 36)
    for dtype in BOUNDS:
        torch.library.opcheck(torch.ops.mmhrformer.layer_norm, (x, weight, bias, EPS, dtype))
    for of_parameters in (True, False):
        args = (grad, x, weight, x, EPS, of_parameters)
        torch.library.opcheck(torch.ops.mmhrformer.layer_norm_backward, args)


@pytest.mark.parametrize('wanted', ['both', 'the first', 'the second'])
def test_gradients_of_both_ways_come_together(small, wanted):
    def forked(x, weight, bias):
        y, skip = triton_layer_norm.fork_layer_norm(x, weight, bias, EPS)
        return join(y, skip)

    def join(y, skip):
        parts = {'both': (y, 2 * skip), 'the first': (y,), 'the second': (3 * skip,)}[wanted]
        return sum(parts)

    tensors = make(19, 40)
    for t in tensors[:3]:
        t.requires_grad_()
    grads = []
    for function in (forked, lambda x, *affine: join(plain(x, *affine), x)):
        out = function(*tensors[:3])
        grads.append(torch.autograd.grad(out, tensors[:3], tensors[3], allow_unused=True))
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_gradients_have_the_data_types_of_the_parameters(dtype):
    tensors = make(9, 36, dtype=torch.float16)
    weight, bias = (t.to(dtype).requires_grad_() for t in tensors[1:3])
    grads = torch.autograd.grad(fused(tensors[0], weight, bias), (weight, bias), tensors[3])
    *_, of_weight, of_bias = exact([tensors[0], *(t.detach() for t in (weight, bias)), tensors[3]])
    for ours, theirs in zip(grads, (of_weight, of_bias)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, atol=1e-2, rtol=2e-3)


# -------------------------------------------------------------------------- ops.fork_layer_norm


def test_the_kernel_is_called_by_the_module(monkeypatch):
    x, weight, bias, _ = make(9, 36)
    norm = nn.LayerNorm(36).to(DEVICE)
    norm.load_state_dict(dict(weight=weight, bias=bias))
    calls = []
    kernel = triton_layer_norm.fork_layer_norm
    with ops.use('kernels'):
        ops.backend(x)  # tries whether kernels run here, once
    monkeypatch.setattr(
        triton_layer_norm, 'fork_layer_norm', lambda *args: (calls.append(args), kernel(*args))[1]
    )
    with ops.use('kernels'):
        torch.testing.assert_close(ops.fork_layer_norm(x, norm)[0], norm(x))
        assert len(calls) == 1
        # What the kernel does not know: the module is called.
        double = nn.LayerNorm(36).double().to(DEVICE)
        assert ops.fork_layer_norm(x.double(), double)[0].dtype == torch.float64
        whole = nn.LayerNorm((9, 36)).to(DEVICE)
        torch.testing.assert_close(ops.fork_layer_norm(x, whole)[0], whole(x))
        long = nn.LayerNorm(1025).to(DEVICE)
        assert ops.fork_layer_norm(x.new_ones(2, 1025), long)[0].shape == (2, 1025)
        norm.register_forward_hook(lambda *_: torch.zeros(()))
        assert ops.fork_layer_norm(x, norm)[0].shape == ()
        with pytest.raises(RuntimeError, match='normalized_shape'):
            ops.fork_layer_norm(x[:, :35], nn.LayerNorm(36).to(DEVICE))
    assert len(calls) == 1


def test_autocast_decides_about_the_data_type():
    x, *_ = make(9, 36)
    norm = nn.LayerNorm(36).to(DEVICE)
    with ops.use('kernels'), torch.autocast(DEVICE, torch.bfloat16):
        out = ops.fork_layer_norm(x, norm)[0]
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().square().sum(), norm.weight)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize('training', [True, False])
def test_block(training):
    torch.manual_seed(0)
    block = HRFormerBlock(embed_dims=32, num_heads=1, window_size=3, mlp_ratio=1)
    block = block.to(DEVICE).train(training)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 4, 3, 32, device=DEVICE, requires_grad=True)
    results = []
    for backend in ('kernels', 'reference'):
        with ops.use(backend):
            out = block(x)
            grads = torch.autograd.grad(out.square().mean(), [x, *block.parameters()])
        results.append([out, *grads])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)

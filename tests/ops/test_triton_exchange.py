"""The sum of an exchange in Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from triton_on_cpu import DEVICE, REASON, plan_anew

if REASON:
    pytest.skip(REASON, allow_module_level=True)

from mmhrformer import HRFormer, ops
from mmhrformer.models.hr_module import HRModule
from mmhrformer.ops import triton_exchange
from mmhrformer.ops.triton_exchange import exchange_sum

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
MODES = ['nearest', 'bilinear']
# Maps (B, C, H, W) and factors of the others: one-pixel maps, sizes that no tile divides, all
# widths of loads.
CASES = [
    ((2, 18, 8, 8), (2, 4, 8)),
    ((1, 32, 16, 8), (2, 4, 8)),
    ((1, 78, 12, 4), (1, 2, 4)),
    ((1, 80, 10, 6), (1, 1, 2)),
    ((1, 7, 2, 26), (2,)),
    ((1, 36, 3, 5), (1, 1)),
]


@pytest.fixture(params=[4, 8])
def rows(request, monkeypatch) -> int:
    """Rows of a program, and programs of few groups."""
    monkeypatch.setattr(triton_exchange, 'ROWS', {request.param: 0})
    monkeypatch.setattr(triton_exchange, 'GROUPS', (64,))
    plan_anew(monkeypatch, triton_exchange)
    return request.param


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    tensor = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return tensor.contiguous(memory_format=torch.channels_last)


def make_maps(size, factors, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    B, C, H, W = size
    others = [make(B, C, H // f, W // f, dtype=dtype, seed=i) for i, f in enumerate(factors, 1)]
    return make(*size, dtype=dtype), others


def plain(x: Tensor, others: list[Tensor], factors, mode: str, relu: nn.Module) -> Tensor:
    with ops.use('reference'):
        pairs = [(other.double(), factor) for other, factor in zip(others, factors)]
        return ops.exchange_sum(x.double(), pairs, mode, relu)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(('size', 'factors'), CASES, ids=str)
def test_as_torch_in_float64(rows, size, factors, mode):
    for dtype, bound in BOUNDS.items():
        x, others = make_maps(size, factors, dtype)
        before = x.clone()
        has_relu = dtype == torch.float32
        relu = nn.ReLU() if has_relu else nn.Identity()
        out = exchange_sum(x, others, factors, mode == 'bilinear', has_relu)
        expected = plain(x, others, factors, mode, relu)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert (out.double() - expected).abs().max() <= bound * expected.abs().max()
        assert torch.equal(x, before)


def test_data_types_are_promoted_and_layouts_do_not_matter(rows):
    x, others = make_maps((2, 16, 8, 12), (2, 4))
    expected = exchange_sum(x, [others[0].half(), others[1]], (2, 4), True, True)
    assert expected.dtype == torch.float32
    contiguous = [others[0].half().contiguous(), others[1].contiguous()]
    out = exchange_sum(x.contiguous(), contiguous, (2, 4), True, True)
    assert torch.equal(out, expected)
    assert exchange_sum(x.half(), [x.bfloat16()], (1,), True, True).dtype == torch.float32


def test_infinity_and_nan_stay(rows):
    x, others = make_maps((1, 8, 8, 8), (4,))
    x[0, 0, 0, 0] = torch.nan
    others[0][0, 1], others[0][0, 2] = torch.inf, -torch.inf
    for bilinear in (False, True):
        out = exchange_sum(x, others, (4,), bilinear, True)
        assert out.isnan().sum() == 1
        assert out[0, 0, 0, 0].isnan()
        assert (out[0, 1] == torch.inf).all()
        assert not out[0, 2].any()


def test_it_is_an_ordinary_operator(rows):
    x, others = make_maps((1, 8, 4, 4), (2, 4))
    arguments = x, others, [2, 4], True, True
    torch.library.opcheck(torch.ops.mmhrformer.exchange_sum, arguments)


# ----------------------------------------------------------------------------------- the modules


@pytest.fixture
def calls(monkeypatch) -> list:
    """The arguments of calls of the kernel, beside the first."""
    seen, function = [], triton_exchange.exchange_sum
    monkeypatch.setattr(
        triton_exchange, 'exchange_sum', lambda *args: (seen.append(args[1:]), function(*args))[1]
    )
    return seen


def exchange(backend: str, x: Tensor, others, factors, mode: str, relu: nn.Module) -> Tensor:
    with ops.use(backend), torch.no_grad():
        return ops.exchange_sum(x, zip(others, factors), mode, relu)


class Leaky(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(x)


def test_activations_that_are_more_than_relu_are_called(calls):
    x, others = make_maps((1, 8, 4, 4), (2,))
    hooked = nn.ReLU(inplace=True)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    for relu in (nn.ReLU(inplace=True), hooked, Leaky(), nn.GELU(), nn.Identity()):
        ours, theirs = (
            exchange(backend, x, others, (2,), 'nearest', relu)
            for backend in ('kernels', 'reference')
        )
        torch.testing.assert_close(ours, theirs)
    assert [args[-1] for args in calls] == [True, False, False, False, False]


def test_what_no_kernel_computes(calls):
    relu = nn.ReLU()
    for size, factors, dtype in (
        ((1, 8, 4, 4), (2,), torch.float64),
        ((1, 8, 4, 4), (), torch.float32),
        ((1, 2, 16, 16), (16,), torch.float32),
        ((1, 2, 4, 4), (1, 1, 1, 1), torch.float32),
        ((0, 8, 4, 4), (1,), torch.float32),
    ):
        x, others = make_maps(size, factors, dtype)
        ours, theirs = (
            exchange(backend, x, others, factors, 'bilinear', relu)
            for backend in ('kernels', 'cuda')
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    x, others = make_maps((1, 8, 4, 4), (2,))
    with ops.use('kernels'):
        ops.exchange_sum(x, [(others[0].requires_grad_(), 2)], 'bilinear', relu).sum().backward()
    assert others[0].grad is not None
    assert not calls


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('size', [(8, 12), (7, 12), (5, 9)])
def test_modules(calls, mode, size):
    """Sizes that are halved twice without rounding, with rounding in one axis, and in both."""
    channels = 6, 8, 10
    module = HRModule([nn.Identity()] * 3, channels, range(3), mode, dict(type='BN')).eval()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3)
    sizes = [[-(-n // 2**i) for n in size] for i in range(3)]
    xs = [make(2, C, *shape) for C, shape in zip(channels, sizes)]
    module.to(DEVICE)
    with torch.no_grad():
        with ops.use('kernels'):
            ours = module(xs)
        with ops.use('reference'):
            theirs = module(xs)
    torch.testing.assert_close(ours, theirs)
    assert len(calls) == 3
    assert calls[0][1] == {(8, 12): [2, 4], (7, 12): [1, 1], (5, 9): [1, 1]}[size]


def test_whole_models(calls):
    """Without their blocks, which take long on a CPU."""
    arch = dict(
        channels=(8, 16, 32, 64), num_heads=(1, 1, 1, 1), num_modules=(1, 1, 1), num_blocks=1,
        mlp_ratio=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = HRFormer(arch=arch, upsample='bilinear').to(DEVICE).eval()
    for module in model.modules():
        if isinstance(module, HRModule):
            module.branches = nn.ModuleList(nn.Identity() for _ in module.branches)
    for size, factors in (((64, 32), [2, 4, 8]), ((40, 56), [2, 1, 1])):
        x = torch.randn(1, 3, *size, device=DEVICE)
        with torch.no_grad():
            with ops.use('kernels'):
                ours = model(x)
            with ops.use('reference'):
                theirs = model(x)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert len(calls) == 2 + 3 + 4
        assert calls[5][1] == factors
        calls.clear()
    with ops.use('kernels'):
        sum(out.sum() for out in model(x)).backward()
    assert not calls

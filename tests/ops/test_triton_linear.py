"""The Triton kernels of linear layers give what float64 gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_on_cpu import BOUNDS, DEVICE, REASON, make, make_tiles_small

if REASON:
    pytest.skip(REASON, allow_module_level=True)

from mmhrformer.ops.triton_linear import linear_forward, linear_gelu

# Rows, and (inputs, outputs).
ROWS = [((), (32, 48)), ((2, 3, 4), (78, 33)), ((130,), (156, 39)), ((1, 1), (16, 130))]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    if DEVICE == 'cpu':
        make_tiles_small(monkeypatch)


@pytest.mark.parametrize('gelu', [True, False])
@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize(('rows', 'sizes'), ROWS)
def test_linear(rows, sizes, dtype, gelu):
    K, N = sizes
    shapes = (*rows, K), (N, K), (N,), (*rows, N)
    x, weight, bias, residual = (make(*shape, dtype=dtype, grad=False) for shape in shapes)
    product = F.linear(x.double(), weight.double())
    for b, r in ((bias, residual), (None, None)):
        out = linear_forward(x, weight, b, gelu, r, None)
        exact = product if b is None else product + b
        exact = F.gelu(exact) if gelu else exact
        exact = exact if r is None else exact + r
        assert out.dtype == dtype
        assert (out - exact).norm() <= BOUNDS[dtype] * exact.norm()
    if gelu:
        assert torch.equal(linear_gelu(x, weight, None), out)


@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize(
    ('channels', 'zeros', 'outputs'),
    [(80, 0, 16), (78, 0, 72), (78, 2, 80), (64, 16, 32), (22, 2, 24)],
)
def test_linear_layer_of_normalized_rows(channels, zeros, outputs, dtype):
    """Padding after the channels is ignored, even if it would overflow."""
    x, weight = (make(n, channels, dtype=dtype, grad=False) for n in (70, outputs))
    x[3] = 1000.0
    padded = (F.pad(tensor, (0, zeros)) for tensor in (x, weight))
    ours = linear_forward(*padded, None, False, None, 1e-6, channels)
    double = F.layer_norm(x.double(), (channels,), eps=1e-6)
    exact = F.linear(double, weight.double())
    assert (ours - exact).norm() <= BOUNDS[dtype] * exact.norm()


def test_rows_that_are_not_contiguous():
    rows, weight = make(6, 64)[:, ::2], make(8, 32)
    assert torch.equal(linear_gelu(rows, weight, None), linear_gelu(rows.clone(), weight, None))


def test_nothing_to_compute():
    assert linear_gelu(make(0, 32), make(8, 32), None).shape == (0, 8)


def test_operators_are_well_formed():
    ops = torch.ops.mmhrformer
    sizes = (3, 5, 32), (8, 32), (8,), (3, 5, 8)
    rows, matrix, bias, residual = (make(*size, grad=False) for size in sizes)
    for op, args in (
        (ops.linear_gelu, (rows, matrix, bias, True, residual, None)),
        (ops.linear_gelu, (rows, matrix, bias, True, None, 1e-6)),
    ):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        (lambda: linear_gelu(make(2, 8).double(), make(8, 8), None), 'x .*float64: convert'),
        (lambda: linear_gelu(make(2, 8), make(8, 8).half(), None), 'weight .*float16: convert'),
        (lambda: linear_gelu(make(2, 8), make(8, 4), None), r'weight .*\(8, 8\)'),
        (lambda: linear_gelu(make(2, 8), make(4, 8), make(8)), r'bias .*\(4,\)'),
    ],
)
def test_errors_name_the_argument_and_the_remedy(call, words):
    with pytest.raises(ValueError, match=words):
        call()

"""How kernels run on CPUs: as compiled, in memory that is checked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_on_cpu import DEVICE, REASON

if REASON or DEVICE != 'cpu':
    pytest.skip(REASON or 'kernels run on the GPU', allow_module_level=True)

import triton
import triton.language as tl

N = tl.constexpr(8)


@triton.jit
def load_and_store(x, out, first, end, shift):
    i = tl.arange(0, N)
    tl.store(out + i + shift, tl.load(x + first + i, mask=i < end))


def run(kernel, *args: Tensor | int) -> None:
    kernel[(1,)](*args)


def test_what_is_masked_is_not_a_number():
    x, out = torch.arange(8.0), torch.zeros(8)
    run(load_and_store, x, out, 2, 6, 0)
    assert torch.equal(out[:6], x[2:])
    assert out[6:].isnan().all()


@pytest.mark.parametrize(
    ('first', 'end', 'shift'), [(2, 8, 0), (-1, 8, 0), (0, 8, 1), (0, 8, -1), (1 << 40, 8, 0)]
)
def test_memory_outside_the_tensors_is_not_accessed(first, end, shift):
    """Not even within the memory of which a tensor is a part."""
    x, out = torch.arange(32.0), torch.zeros(32)
    with pytest.raises(AssertionError, match='of 8 addresses are in no tensor') as caught:
        run(load_and_store, x[8:16], out[8:16], first, end, shift)
    assert any('tt.load' in note or 'tt.store' in note for note in caught.value.__notes__)
    assert not out[:8].any()
    assert not out[16:].any()


@triton.jit
def change_type(x, out, n):
    total = 0
    for k in range(n):
        total = total + tl.load(x + k)
    tl.store(out, total)


def test_it_is_the_compiled_kernel_that_runs():
    """Triton's interpreter would add the numbers."""
    with pytest.raises(triton.CompilationError, match='total has initial type int32'):
        run(change_type, torch.ones(8), torch.zeros(1), 8)


@triton.jit
def divide(a, b, out):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x // y)
    tl.store(out + N + i, x % y)
    tl.store(out + 2 * N + i, (x < y).to(tl.int32))
    tl.store(out + 3 * N + i, (x > 0) & (y > 0))


def test_integers():
    a = torch.tensor([7, -7, 7, -7, 0, 1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    b = torch.tensor([2, 2, -2, -2, 3, 7, 10, 3], dtype=torch.int32)
    out = torch.zeros(4, 8, dtype=torch.int32)
    run(divide, a, b, out)
    quotient = torch.div(a, b, rounding_mode='trunc')
    expected = [quotient, a - quotient * b, (a < b).int(), ((a > 0) & (b > 0)).int()]
    assert torch.equal(out, torch.stack(expected))


@triton.jit
def round_to(x, out):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_rounding(dtype):
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1.1, 3.4e38, 1e-42, float('inf'), 65520, 0.1])
    out = torch.zeros(8, dtype=dtype)
    run(round_to, x, out)
    assert torch.equal(out, x.to(dtype))
    x[0] = float('nan')
    run(round_to, x, out)
    assert out[0].isnan()


@triton.jit
def reduce(x, out):
    i, j = tl.arange(0, N), tl.arange(0, 4)
    rows = tl.load(x + i[:, None] * 4 + j[None, :])
    tl.store(out + j, tl.sum(rows, 0))
    tl.store(out + 4 + i, tl.max(rows, 1))
    total, k = 0.0, 0
    while total < 3:
        total += tl.load(x + k)
        k += 1
    if k > 2:
        tl.store(out + 12, total)
    else:
        tl.store(out + 13, total)


def test_reductions_and_control_flow():
    x, out = torch.rand(8, 4).add(0.5), torch.zeros(14)
    run(reduce, x, out)
    torch.testing.assert_close(out[:4], x.sum(0))
    assert torch.equal(out[4:12], x.amax(1))
    sums = x.flatten().cumsum(0)
    torch.testing.assert_close(out[12], sums[sums >= 3][0])
    assert out[13] == 0

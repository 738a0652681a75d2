"""Deterministic reduction of the partial sums that the programs of a kernel write, in Triton.

The results are written directly to the gradients of parameters, in their data type and memory
layout, so nothing is copied afterwards. Import this only where Triton is installed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Launch, planned

# Parts at a time, channels of a program, warps; the same as COMBINE in triton_norm.py.
LAUNCH = (128, 16, 8)


@triton.jit(do_not_specialize=['P'])
def _add_parts(
    parts, first, last, total, zeros, P, C: tl.constexpr, ROWS: tl.constexpr,
    STRIDE_ROW: tl.constexpr, STRIDE_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Sum ``parts`` (P, ROWS, C) over P; a program computes BLOCK_C channels of one row."""
    p = tl.arange(0, BLOCK_P)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1)
    in_c = c < C
    at = parts + p[:, None] * (ROWS * C) + row * C + c[None, :]
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(TILES):
        mask = (p + i * BLOCK_P < P)[:, None] & in_c[None, :]
        sums += tl.load(at + i * BLOCK_P * ROWS * C, mask=mask, other=0.0)
    result = tl.sum(sums, 0)
    if total is not None:
        tl.store(total + row * C + c, result, mask=in_c)
    here = first + row * STRIDE_ROW + c * STRIDE_C
    tl.store(here, result.to(first.dtype.element_ty), mask=in_c & (row < ROWS - 1))
    tl.store(last + c, result.to(last.dtype.element_ty), mask=in_c & (row == ROWS - 1))
    if zeros is not None:
        nothing = tl.zeros((BLOCK_C,), tl.float32).to(zeros.dtype.element_ty)
        tl.store(zeros + c, nothing, mask=in_c & (row == 0))


def _plan(parts: int, rows: int, C: int, strides: tuple[int, int]) -> Launch:
    """The launch for parts of shape (parts, rows, C)."""
    block_p, block_c, warps = LAUNCH
    # A power of two, to compile fewer kernels.
    tiles = triton.next_power_of_2(max(1, triton.cdiv(parts, block_p)))
    names = dict(C=C, ROWS=rows, STRIDE_ROW=strides[0], STRIDE_C=strides[1])
    names |= dict(BLOCK_P=block_p, BLOCK_C=block_c, TILES=tiles, num_warps=warps)
    return Launch(_add_parts, (triton.cdiv(C, block_c), rows), parts, **names)


def add_parts(
    parts: Tensor,
    first: Tensor,
    last: Tensor,
    strides: tuple[int, int] = (0, 1),
    total: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    """Sum partial sums, and write the rows of the result to one or two tensors.

    Args:
        parts (Tensor): Partial sums in float32, of shape (parts, rows, C).
        first (Tensor): Destination of all rows but the last.
        last (Tensor): Destination of the last row, of shape (C,).
        strides (tuple[int, int]): Strides of rows and channels in ``first``. Defaults to (0, 1),
            for a single row.
        total (Tensor, optional): Destination of all rows in float32, of shape (rows, C).
        zeros (Tensor, optional): Tensor of shape (C,) to fill with zeros.
    """
    P, rows, C = parts.shape
    planned(_plan, P, rows, C, strides)(parts, first, last, total, zeros)

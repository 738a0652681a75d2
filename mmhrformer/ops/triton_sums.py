"""Sums of what the programs of a kernel leave, in Triton: the same bits each time.

They are written as the gradients of parameters that they are, in their data type and memory layout,
so that nothing needs to be copied. Import this only where Triton is installed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Launch, planned

# How many parts at a time, of how many channels, warps; as what combines moments in triton_norm.py.
LAUNCH = (128, 16, 8)


@triton.jit(do_not_specialize=['P'])
def _add_parts(
    parts, first, last, total, zeros, P, C: tl.constexpr, ROWS: tl.constexpr,
    STRIDE_ROW: tl.constexpr, STRIDE_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """A row of the sum of ``parts`` (P, ROWS, C), of BLOCK_C channels."""
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
    """The launch for parts of some rows of C numbers."""
    block_p, block_c, warps = LAUNCH
    # Not any number, each of which would be a kernel of its own.
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
    """Add parts of sums up, and write the result to where it is wanted.

    Args:
        parts (Tensor): Partial sums in float32, of shape (parts, rows, C).
        first (Tensor): What all rows but the last one are written to.
        last (Tensor): What the last row is written to, of shape (C,).
        strides (tuple[int, int]): From row to row and from channel to channel in ``first``.
            Defaults to (0, 1), for a single row.
        total (Tensor, optional): What all rows are written to in float32, of shape (rows, C).
        zeros (Tensor, optional): What zeros are written to, of shape (C,).
    """
    P, rows, C = parts.shape
    planned(_plan, P, rows, C, strides)(parts, first, last, total, zeros)

"""The sum of an exchange between streams in Triton: upsampling, additions and ReLU in one kernel.

In inference only. torch's bilinear upsampling of channels-last maps alone took 14.1 % (HRFormer-S)
and 11.9 % (B) of folded models on an H200, 64 images in a CUDA graph, for a tenth of the bytes that
can be moved in that time. Import this only where Triton can run: it registers the operator
``mmhrformer::exchange_sum``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Launch, planned
from .triton_support import channels_last, thin_operator

# Rows of the output in a program, and the least number of threads for which there are so many. Each
# row of a coarser map is loaded and interpolated horizontally once for all rows of a program: with
# three coarser maps in bf16, a number of the output takes 36 instructions with 2 rows, 25 with 4,
# and 19 with 8. Not timed on a GPU yet.
ROWS = {8: 1 << 15, 4: 0}
# A thread has a group of up to 8 channels, 16 bytes in 16 bits. A program has one of these numbers
# of groups of a row: the one that leaves the fewest empty, or the largest that leaves less than an
# eighth empty.
GROUPS = (128, 64, 32)
# The most maps beside the first, the largest factor of one, and the limit of the grid axis to which
# images are mapped.
MAX_MAPS = 3
MAX_FACTOR = 8
MAX_IMAGES = 65_535


@triton.jit
def _load(x, y, stride, at):
    """The numbers (GROUPS, VEC) of row y, in float32."""
    numbers = tl.load(x + (y * stride + at))
    if numbers.dtype == tl.bfloat16:
        # One instruction each, where Triton's conversion takes three for two numbers.
        bits = numbers.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        numbers = bits.to(tl.float32, bitcast=True)
    return numbers.to(tl.float32)


@triton.jit
def _between(a, b, weight):
    """Linear interpolation. The difference of infinities would be NaN, this is not."""
    return a * (1.0 - weight) + b * weight


@triton.jit
def _offsets(col, place, GROUPS_C: tl.constexpr, VEC: tl.constexpr):
    """Offsets (GROUPS, VEC) in a row of a map."""
    return ((col * GROUPS_C + place) * VEC)[:, None] + tl.arange(0, VEC)[None, :]


@triton.jit
def _add_nearest(
    sums, x, top, col, place, H, W,
    LEVEL: tl.constexpr, GROUPS_C: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the rows of a map of 1 / 2**LEVEL of the size, each repeated."""
    h, w = H >> LEVEL, W >> LEVEL
    at = _offsets(col >> LEVEL, place, GROUPS_C, VEC)
    added = ()
    if (1 << LEVEL) >= ROWS:
        line = _load(x, tl.minimum(top >> LEVEL, h - 1), w * (GROUPS_C * VEC), at)
        for i in tl.static_range(ROWS):
            added = added + (sums[i] + line,)
    else:
        for j in tl.static_range(ROWS >> LEVEL):
            y = tl.minimum((top >> LEVEL) + j, h - 1)
            line = _load(x, y, w * (GROUPS_C * VEC), at)
            for i in tl.static_range(1 << LEVEL):
                added = added + (sums[(j << LEVEL) + i] + line,)
    return added


@triton.jit
def _add_bilinear(
    sums, x, top, col, place, H, W,
    LEVEL: tl.constexpr, GROUPS_C: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the rows of a map of 1 / 2**LEVEL of the size, interpolated.

    Pixel n of the output is at (n + 1/2) / factor - 1/2 of the map, in integers: (2 n + 1 - factor)
    / (2 factor). Outside of the first and the last pixel these are repeated.
    """
    TWICE: tl.constexpr = 2 << LEVEL
    h, w = H >> LEVEL, W >> LEVEL
    n = 2 * col + (1 - TWICE // 2)
    left = n >> (LEVEL + 1)
    weight = ((n & (TWICE - 1)).to(tl.float32) * (1.0 / TWICE))[:, None]
    right = _offsets(tl.minimum(left + 1, w - 1), place, GROUPS_C, VEC)
    left = _offsets(tl.maximum(left, 0), place, GROUPS_C, VEC)
    m = 2 * top + (1 - TWICE // 2)
    # Rows of the output that lie between the same rows of the map, or a multiple of them.
    FEW: tl.constexpr = (1 << LEVEL) > ROWS
    SOURCES: tl.constexpr = 2 if FEW else (2 * ROWS - 1 - TWICE // 2) // TWICE + 3
    lines = ()
    for i in tl.static_range(SOURCES):
        y = tl.minimum(tl.maximum((m >> (LEVEL + 1)) + i, 0), h - 1)
        a = _load(x, y, w * (GROUPS_C * VEC), left)
        b = _load(x, y, w * (GROUPS_C * VEC), right)
        lines = lines + (_between(a, b, weight),)
    added = ()
    for i in tl.static_range(ROWS):
        if FEW:
            down = ((m + 2 * i) & (TWICE - 1)).to(tl.float32) * (1.0 / TWICE)
            added = added + (sums[i] + lines[0] * (1.0 - down) + lines[1] * down,)
        else:  # known when the kernel is compiled
            above = lines[(2 * i + 1 + TWICE // 2) // TWICE]
            below = lines[(2 * i + 1 + TWICE // 2) // TWICE + 1]
            up = 1.0 - ((2 * i + 1 + TWICE // 2) % TWICE) / TWICE
            down = ((2 * i + 1 + TWICE // 2) % TWICE) / TWICE
            added = added + (sums[i] + above * up + below * down,)
    return added


@triton.jit
def _add(
    sums, x, top, col, place, H, W, BILINEAR: tl.constexpr,
    LEVEL: tl.constexpr, GROUPS_C: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add a map of 1 / 2**LEVEL of the size to ROWS rows (GROUPS, VEC)."""
    if BILINEAR and LEVEL > 0:
        added = _add_bilinear(sums, x, top, col, place, H, W, LEVEL, GROUPS_C, VEC, ROWS)
    else:
        added = _add_nearest(sums, x, top, col, place, H, W, LEVEL, GROUPS_C, VEC, ROWS)
    return added


@triton.jit(do_not_specialize=['H', 'W'])
def _kernel(
    x, a, b, c, out, H, W,
    LEVEL_A: tl.constexpr, LEVEL_B: tl.constexpr, LEVEL_C: tl.constexpr,
    BILINEAR: tl.constexpr, RELU: tl.constexpr,
    C: tl.constexpr, VEC: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """relu(x + a + b + c) of maps (B, H, W, C), and (B, H / 2**LEVEL, W / 2**LEVEL, C)."""
    GROUPS_C: tl.constexpr = C // VEC
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    in_row = (group < W * GROUPS_C)[:, None]
    # What is beyond the end is read from the end instead, which takes no mask.
    group = tl.minimum(group, W * GROUPS_C - 1)
    col = group // GROUPS_C
    place = group - col * GROUPS_C
    top = tl.program_id(1) * ROWS
    image = tl.program_id(2).to(tl.int64)
    x += image * (H * W * C)
    out += image * (H * W * C)
    sums = ()
    at = _offsets(0, group, GROUPS_C, VEC)
    for i in tl.static_range(ROWS):
        sums = sums + (_load(x, tl.minimum(top + i, H - 1), W * C, at),)
    if a is not None:
        a += image * ((H >> LEVEL_A) * (W >> LEVEL_A) * C)
        sums = _add(sums, a, top, col, place, H, W, BILINEAR, LEVEL_A, GROUPS_C, VEC, ROWS)
    if b is not None:
        b += image * ((H >> LEVEL_B) * (W >> LEVEL_B) * C)
        sums = _add(sums, b, top, col, place, H, W, BILINEAR, LEVEL_B, GROUPS_C, VEC, ROWS)
    if c is not None:
        c += image * ((H >> LEVEL_C) * (W >> LEVEL_C) * C)
        sums = _add(sums, c, top, col, place, H, W, BILINEAR, LEVEL_C, GROUPS_C, VEC, ROWS)
    for i in tl.static_range(ROWS):
        result = sums[i]
        if RELU:
            result = tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL)
        at_row = out + ((top + i) * (W * C) + at)
        tl.store(at_row, result.to(out.dtype.element_ty), mask=in_row & (top + i < H))


def _plan(shape: tuple[int, ...], factors: tuple[int, ...], bilinear: bool, relu: bool) -> Launch:
    """The launch for a map (B, C, H, W) and those that are enlarged by the factors."""
    B, C, H, W = shape
    vec = min(C & -C, 8)  # the largest power of two that divides C, up to 8
    needed = W * C // vec
    groups = min(GROUPS, key=lambda groups: max(-needed % groups, needed // 8))
    rows = next(n for n, least in ROWS.items() if B * triton.cdiv(H, n) * needed >= least)
    levels = [factor.bit_length() - 1 for factor in factors] + [0] * (MAX_MAPS - len(factors))
    return Launch(
        _kernel, (triton.cdiv(needed, groups), triton.cdiv(H, rows), B), H, W,
        LEVEL_A=levels[0], LEVEL_B=levels[1], LEVEL_C=levels[2], BILINEAR=bilinear, RELU=relu,
        C=C, VEC=vec, GROUPS=groups, ROWS=rows, num_warps=groups // 32,
    )  # fmt: skip


def _empty(x: Tensor, others: Sequence[Tensor], *_) -> Tensor:
    """Memory for the sum: channels-last, in the data type to which all are promoted."""
    dtype = reduce(torch.promote_types, (other.dtype for other in others), x.dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


@thin_operator(
    'exchange_sum(Tensor x, Tensor[] others, int[] factors, bool bilinear, bool relu) -> Tensor',
    _empty,
)
def exchange_sum(
    x: Tensor, others: Sequence[Tensor], factors: Sequence[int], bilinear: bool, relu: bool
) -> Tensor:
    """The sum of a map (B, C, H, W) and of others, which are enlarged.

    The arithmetic is in float32 for all data types, and the result is rounded once. There are no
    gradients.

    Args:
        x (Tensor): Map of shape (B, C, H, W), in float32, float16 or bfloat16, like the others;
            each is copied if not channels-last in memory.
        others (Sequence[Tensor]): At most three maps of shape (B, C, H / factor, W / factor).
        factors (Sequence[int]): Their factors: 1, 2, 4 or 8.
        bilinear (bool): Whether they are interpolated; otherwise pixels are repeated.
        relu (bool): Whether negative sums become zero.

    Returns:
        Tensor: Map of shape (B, C, H, W), channels-last in memory.
    """
    maps = list(map(channels_last, (x, *others)))
    out = _empty(*maps[:1], maps[1:])
    absent = [None] * (MAX_MAPS - len(others))
    planned(_plan, x.shape, tuple(factors), bilinear, relu)(*maps, *absent, out)
    return out

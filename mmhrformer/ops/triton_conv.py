"""Triton kernels of folded FFNs: depth-wise convolution and linear layer, each fused with GELU.

In inference each of the three layers of an FFN reads and writes its map once. Import this only
where Triton can run: it registers the operators ``mmhrformer::depthwise_gelu`` and
``mmhrformer::linear_gelu``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .state import needs_grad
from .triton_launch import Launch, planned
from .triton_sums import add_parts
from .triton_support import DTYPES, refuse_second_derivatives, thin_operator


class DepthwiseTile(NamedTuple):
    """Tile of a program of the depth-wise kernel, and its number of warps.

    Each row is prefetched while the one above it is processed: into registers with ``ahead``, into
    shared memory with more than one of ``stages``.
    """

    rows: int
    cols: int
    channels: int
    warps: int
    ahead: bool = True
    stages: int = 1


class LinearTile(NamedTuple):
    """Tile of a program of the linear kernel, and its number of warps.

    ``k`` is for 16-bit numbers, and halved for 32-bit ones. ``group`` blocks of rows go through all
    blocks of columns together, so that both operands stay in the L2 cache.
    """

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int


class NormTile(NamedTuple):
    """Tile of a program of the linear kernel with normalization, and its number of warps.

    A program goes through ``n`` outputs at a time of ``m`` rows: through all of them, unless that
    leaves fewer than ``programs``.
    """

    m: int
    n: int
    warps: int
    stages: int
    programs: int


# By the width of the output, up to and including the key. Microseconds on an H200, batch 64, bf16:
# 64x48x128 takes 50 (torch 154), 64x48x312 116 (359), 16x12x512 13 (39).
DEPTHWISE_TILES = {
    8: DepthwiseTile(rows=8, cols=8, channels=64, warps=4),
    16: DepthwiseTile(rows=16, cols=4, channels=128, warps=4),
    1 << 31: DepthwiseTile(rows=32, cols=8, channels=64, warps=4, ahead=False, stages=3),
}
# The choices of linear_tile().
LINEAR_TILES = {
    'unaligned': LinearTile(m=128, n=64, k=32, group=1, warps=4, stages=4),
    'few outputs': LinearTile(m=64, n=32, k=64, group=1, warps=4, stages=3),
    'more outputs': LinearTile(m=64, n=128, k=64, group=1, warps=4, stages=3),
    'one block': LinearTile(m=128, n=128, k=64, group=1, warps=8, stages=3),
    'fewer outputs': LinearTile(m=128, n=64, k=64, group=1, warps=4, stages=3),
}


# Of the linear kernel with normalization, by the number of inputs, up to and including the key.
# Microseconds on an H200, 64 images, bf16, and before rows were normalized once for all outputs: 32
# to 128 inputs take 27 (34), 64 to 256 16 (19), 80 to 312 94 (183), 160 to 624 71 (106), with GELU.
# 312 to 1248 would take 92 (84): wider rows are normalized by the kernel of layer normalization.
NORM_TILES = {
    128: NormTile(m=64, n=64, warps=4, stages=1, programs=528),
    256: NormTile(m=64, n=64, warps=4, stages=2, programs=528),
}


def linear_tile(N: int, K: int) -> LinearTile:
    """Choose a tile for N outputs of K inputs.

    Microseconds on an H200 for the first stream of 64 images in bf16, GELU included: 32 to 128
    inputs take 27 (torch 74), 128 to 32 20 (32), 78 to 312 110 (221), 312 to 78 63 (127).
    """
    if K % 8 or (K <= 32 < N):
        return LINEAR_TILES['unaligned']
    if N <= 32:
        return LINEAR_TILES['few outputs']
    if N > K:
        return LINEAR_TILES['more outputs']
    return LINEAR_TILES['one block' if 64 < N < 128 else 'fewer outputs']


@triton.jit
def _normal_tail(x):
    """1 - Phi(|x|) for the distribution function Phi, and exp(-x^2 / 2).

    A polynomial with an error of at most 7e-8, the rounding error of 1 + erf(x) in float32, in half
    the instructions of CUDA's erf, which would make the kernel slower than the memory.
    """
    # The square of a reciprocal square root takes 2 instructions, a division 9.
    root = tl.rsqrt(1.0 + 0.33 * tl.abs(x))
    t = root * root
    bell = tl.exp2(x * x * -0.7213475204444817)
    tail = 0.37929653 - 0.11067714 * t
    tail = -0.09625532 + tail * t
    tail = 0.20623905 + tail * t
    tail = 0.1213969 + tail * t
    return tail * t * bell, bell


@triton.jit
def _gelu(x):
    tail, _ = _normal_tail(x)
    return tl.maximum(x, 0.0) - tl.abs(x) * tail


@triton.jit
def _gelu_slope(x):
    tail, bell = _normal_tail(x)
    return tl.where(x > 0.0, 1.0 - tail, tail) + x * bell * 0.3989422804014327


@triton.jit
def _add(sum, x0, x1, x2, w0, w1, w2):
    """Add products to ``sum``, which comes first so that each is one multiply-add instruction."""
    return sum + x0.to(tl.float32) * w0 + x1.to(tl.float32) * w1 + x2.to(tl.float32) * w2


@triton.jit
def _taps(weight, c, in_c, first, W_C: tl.constexpr, W_TAP: tl.constexpr, STEP: tl.constexpr):
    """Three taps (BLOCK_C,) in a row of the window, from ``first`` on in steps of STEP."""
    at = weight + c * W_C + first * W_TAP
    left = tl.load(at, mask=in_c, other=0.0).to(tl.float32)
    middle = tl.load(at + STEP * W_TAP, mask=in_c, other=0.0).to(tl.float32)
    right = tl.load(at + 2 * STEP * W_TAP, mask=in_c, other=0.0).to(tl.float32)
    return left[None, :], middle[None, :], right[None, :]


@triton.jit
def _row(x, y, end, col, c, in_c, W, C: tl.constexpr):
    """The tiles (COLS, BLOCK_C) of row y for the three taps in a row of the window."""
    at = x + (y * W + col)[:, None] * C + c[None, :]
    in_y = (y >= 0) & (y < end)
    # Two of the three come from the L1 cache.
    left = tl.load(
        at - C, mask=(in_y & (col >= 1) & (col <= W))[:, None] & in_c[None, :], other=0.0
    )
    middle = tl.load(at, mask=(in_y & (col < W))[:, None] & in_c[None, :], other=0.0)
    right = tl.load(at + C, mask=(in_y & (col < W - 1))[:, None] & in_c[None, :], other=0.0)
    return left, middle, right


@triton.jit
def _advance(next0, next1, next2, x, y, end, col, c, in_c, W, C: tl.constexpr, AHEAD: tl.constexpr):
    """The tiles of row y, and with AHEAD the prefetched ones of the row below."""
    if AHEAD:
        x0, x1, x2 = next0, next1, next2
        next0, next1, next2 = _row(x, y + 1, end, col, c, in_c, W, C)
    else:
        x0, x1, x2 = _row(x, y, end, col, c, in_c, W, C)
    return x0, x1, x2, next0, next1, next2


@triton.jit(do_not_specialize=['H', 'W', 'OH', 'OW'])
def _depthwise_kernel(
    x, weight, bias, grad, out, H, W, OH, OW,
    C: tl.constexpr, W_C: tl.constexpr, W_TAP: tl.constexpr, STRIDE: tl.constexpr,
    FLIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GRAD: tl.constexpr, GELU: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """gelu(conv3x3(x) + bias) of a map (B, H, W, C), or grad * gelu'(conv3x3(x) + bias).

    A program goes down ROWS rows of the output. Each input row is read once and added to all
    output rows that depend on it.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    across = tl.cdiv(OW, COLS)
    down = tl.cdiv(OH, ROWS)
    tile = tl.program_id(0) // BLOCKS
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    col = tile % across * COLS + tl.arange(0, COLS)
    top = tile // across % down * ROWS
    b = (tile // (across * down)).to(tl.int64)
    x += b * H * W * C
    out += b * OH * OW * C
    grad += b * OH * OW * C
    in_c = c < C
    # With flipped taps, the convolution computes the input gradient.
    STEP: tl.constexpr = -1 if FLIP else 1
    a0, a1, a2 = _taps(weight, c, in_c, 8 if FLIP else 0, W_C, W_TAP, STEP)
    b0, b1, b2 = _taps(weight, c, in_c, 5 if FLIP else 3, W_C, W_TAP, STEP)
    c0, c1, c2 = _taps(weight, c, in_c, 2 if FLIP else 6, W_C, W_TAP, STEP)
    start = tl.zeros((COLS, BLOCK_C), tl.float32)
    if HAS_BIAS:
        start += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    y = top * STRIDE - 1
    end = tl.minimum(H, y + STRIDE * (ROWS - 1) + 3)
    left = col * STRIDE
    x0, x1, x2 = _row(x, y, end, left, c, in_c, W, C)
    n0, n1, n2 = x0, x1, x2
    if AHEAD:
        n0, n1, n2 = _row(x, y + 1, end, left, c, in_c, W, C)
    # Partial sums that lack the lowest row, and for stride 1 those that lack the two lowest rows.
    one = _add(start, x0, x1, x2, a0, a1, a2)
    two = start
    if STRIDE == 1:
        y += 1
        x0, x1, x2, n0, n1, n2 = _advance(n0, n1, n2, x, y, end, left, c, in_c, W, C, AHEAD)
        one = _add(one, x0, x1, x2, b0, b1, b2)
        two = _add(start, x0, x1, x2, a0, a1, a2)
    for row in tl.range(top, top + ROWS, num_stages=STAGES):
        y = row * STRIDE
        if STRIDE == 2:
            x0, x1, x2, n0, n1, n2 = _advance(n0, n1, n2, x, y, end, left, c, in_c, W, C, AHEAD)
            one = _add(one, x0, x1, x2, b0, b1, b2)
        y += 1
        x0, x1, x2, n0, n1, n2 = _advance(n0, n1, n2, x, y, end, left, c, in_c, W, C, AHEAD)
        result = _add(one, x0, x1, x2, c0, c1, c2)
        if STRIDE == 2:
            one = _add(start, x0, x1, x2, a0, a1, a2)
        else:
            one = _add(two, x0, x1, x2, b0, b1, b2)
            two = _add(start, x0, x1, x2, a0, a1, a2)
        at = (row * OW + col)[:, None] * C + c[None, :]
        mask = ((row < OH) & (col < OW))[:, None] & in_c[None, :]
        if HAS_GRAD:
            result = _gelu_slope(result) * tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        elif GELU:
            result = _gelu(result)
        tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['H', 'W'])
def _depthwise_weight_kernel(
    x, grad, out, H, W,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of the nine taps and the bias, summed over a tile, and written to the tile's part
    of ``out`` (tiles, 10, C), so that results are deterministic.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    across = tl.cdiv(W, COLS)
    down = tl.cdiv(H, ROWS)
    tile = tl.program_id(0) // BLOCKS
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    col = tile % across * COLS + tl.arange(0, COLS)
    top = tile // across % down * ROWS
    b = (tile // (across * down)).to(tl.int64)
    x += b * H * W * C
    grad += b * H * W * C
    in_c = c < C
    mask = (col < W)[:, None] & in_c[None, :]
    at = col[:, None] * C + c[None, :]
    zero = tl.zeros((COLS, BLOCK_C), tl.float32)
    a0, a1, a2, b0, b1, b2, c0, c1, c2 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    # If here and above were the same value before the loop, Triton would not notice that the loop
    # assigns one to the other, and compute with zeros.
    total, here, above = zero, zero, tl.zeros((COLS, BLOCK_C), tl.float32)
    below = tl.load(grad + top * W * C + at, mask=mask, other=0.0).to(tl.float32)
    for i in range(ROWS + 2):
        y = top - 1 + i
        x0, x1, x2 = _row(x, y, H, col, c, in_c, W, C)
        x0, x1, x2 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32)
        a0, a1, a2 = a0 + below * x0, a1 + below * x1, a2 + below * x2
        b0, b1, b2 = b0 + here * x0, b1 + here * x1, b2 + here * x2
        c0, c1, c2 = c0 + above * x0, c1 + above * x1, c2 + above * x2
        total += below
        above, here = here, below
        real = mask & (i + 1 < ROWS) & (y + 2 < H)
        below = tl.load(grad + (y + 2) * W * C + at, mask=real, other=0.0).to(tl.float32)
    out += tile.to(tl.int64) * 10 * C + c
    tl.store(out, tl.sum(a0, 0), mask=in_c)
    tl.store(out + C, tl.sum(a1, 0), mask=in_c)
    tl.store(out + 2 * C, tl.sum(a2, 0), mask=in_c)
    tl.store(out + 3 * C, tl.sum(b0, 0), mask=in_c)
    tl.store(out + 4 * C, tl.sum(b1, 0), mask=in_c)
    tl.store(out + 5 * C, tl.sum(b2, 0), mask=in_c)
    tl.store(out + 6 * C, tl.sum(c0, 0), mask=in_c)
    tl.store(out + 7 * C, tl.sum(c1, 0), mask=in_c)
    tl.store(out + 8 * C, tl.sum(c2, 0), mask=in_c)
    tl.store(out + 9 * C, tl.sum(total, 0), mask=in_c)


@triton.jit(do_not_specialize=['M'])
def _linear_kernel(
    x, weight, bias, extra, out, M, N: tl.constexpr, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GRAD: tl.constexpr,
    GELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """gelu(x W^T + bias) + extra, or extra * gelu'(x W^T + bias); x (M, K), weight (N, K)."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(0) // (GROUP * BLOCKS) * GROUP
    size = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    place = tl.program_id(0) % (GROUP * BLOCKS)
    start = (first + place % size) * BLOCK_M
    n = place // size * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    x += start.to(tl.int64) * K
    out += start.to(tl.int64) * N
    extra += start.to(tl.int64) * N
    in_m, in_n = m < M - start, n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        mask_a, mask_b = in_m[:, None], in_n[None, :]
        if K % BLOCK_K:
            mask_a &= (k < K)[None, :]
            mask_b &= (k < K)[:, None]
        a = tl.load(x + m[:, None] * K + k[None, :], mask=mask_a, other=0.0)
        b = tl.load(weight + n[None, :] * K + k[:, None], mask=mask_b, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    at = m[:, None] * N + n[None, :]
    mask = in_m[:, None] & in_n[None, :]
    if HAS_GRAD:
        acc = _gelu_slope(acc) * tl.load(extra + at, mask=mask, other=0.0).to(tl.float32)
    elif GELU:
        acc = _gelu(acc)
    if HAS_RESIDUAL:
        acc += tl.load(extra + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['M', 'eps'])
def _norm_linear_kernel(
    x, weight, bias, out, M, eps, N: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """gelu(normalize(x) W^T + bias) for x (M, K) and weight (N, K).

    The first CHANNELS numbers of each row are normalized, the others are zeros. A program reads and
    normalizes whole rows once, and computes one of PARTS of their outputs.
    """
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    SIZE: tl.constexpr = (BLOCKS + PARTS - 1) // PARTS
    start = tl.program_id(0) // PARTS * BLOCK_M
    first = tl.program_id(0) % PARTS * SIZE
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    x += start.to(tl.int64) * K
    out += start.to(tl.int64) * N
    in_m, in_k = m < M - start, k < K
    # Load aligned whole rows, then mask the padding.
    a = tl.load(x + m[:, None] * K + k[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0)
    a = a.to(tl.float32)
    mean = tl.sum(a, 1) / CHANNELS
    a = tl.where((k < CHANNELS)[None, :], a - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(a * a, 1) / CHANNELS + eps)
    a = (a * scale[:, None]).to(weight.dtype.element_ty)
    for i in range(first, tl.minimum(first + SIZE, BLOCKS)):
        n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < N
        mask = in_n[None, :] & in_k[:, None]
        b = tl.load(weight + n[None, :] * K + k[:, None], mask=mask, other=0.0)
        acc = tl.dot(a, b, input_precision=PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if GELU:
            acc = _gelu(acc)
        mask = in_m[:, None] & in_n[None, :]
        tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------- launches


def _tiling(B: int, H: int, W: int, C: int) -> tuple[DepthwiseTile, int, int, int]:
    """The tile for a map, the channels of a block, and the numbers of tiles and blocks."""
    tile = next(tile for width, tile in DEPTHWISE_TILES.items() if width >= W)
    block = min(tile.channels, triton.next_power_of_2(C))
    tiles = B * triton.cdiv(H, tile.rows) * triton.cdiv(W, tile.cols)
    return tile, block, tiles, triton.cdiv(C, block)


def _plan_depthwise(
    shape: tuple[int, ...], strides: tuple[int, ...], stride: int, flip: bool,
    has_bias: bool, has_grad: bool, gelu: bool,
) -> Launch:  # fmt: skip
    """The launch for a map (B, C, H, W) and a weight of given strides."""
    B, C, H, W = shape
    OH, OW = triton.cdiv(H, stride), triton.cdiv(W, stride)
    tile, block, tiles, blocks = _tiling(B, OH, OW, C)
    return Launch(
        _depthwise_kernel, (tiles * blocks,), H, W, OH, OW,
        C=C, W_C=strides[0], W_TAP=strides[3], STRIDE=stride, FLIP=flip,
        HAS_BIAS=has_bias, HAS_GRAD=has_grad, GELU=gelu,
        ROWS=tile.rows, COLS=tile.cols, BLOCK_C=block, AHEAD=tile.ahead,
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


def _plan_depthwise_weight(shape: tuple[int, ...]) -> Launch:
    """The launch for the weight gradients from the gradient of a map (B, C, H, W)."""
    B, C, H, W = shape
    tile, block, tiles, blocks = _tiling(B, H, W, C)
    return Launch(
        _depthwise_weight_kernel, (tiles * blocks,), H, W,
        C=C, ROWS=tile.rows, COLS=tile.cols, BLOCK_C=block, num_warps=tile.warps,
    )  # fmt: skip


def _plan_linear(
    M: int, N: int, K: int, dtype: torch.dtype, gelu: bool, has_bias: bool, has_residual: bool,
    has_grad: bool,
) -> Launch:  # fmt: skip
    """The launch for M rows of K numbers and a weight (N, K)."""
    tile = linear_tile(N, K)
    block_n, block_k = (max(16, triton.next_power_of_2(n)) for n in (N, K))
    block_n = min(tile.n, block_n)
    return Launch(
        _linear_kernel, (triton.cdiv(M, tile.m) * triton.cdiv(N, block_n),), M, N=N, K=K,
        HAS_BIAS=has_bias, HAS_RESIDUAL=has_residual, HAS_GRAD=has_grad, GELU=gelu,
        PRECISION='tf32x3' if dtype == torch.float32 else 'tf32',
        BLOCK_M=tile.m, BLOCK_N=block_n, BLOCK_K=min(tile.k * 2 // dtype.itemsize, block_k),
        GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _plan_norm_linear(
    M: int, N: int, K: int, dtype: torch.dtype, eps: float, channels: int, gelu: bool,
    has_bias: bool,
) -> Launch:  # fmt: skip
    """The launch for M rows of K numbers, of which the channels are normalized first."""
    tile = next(tile for most, tile in NORM_TILES.items() if most >= K)
    block_n, block_k = (max(16, triton.next_power_of_2(n)) for n in (N, K))
    block_n = min(tile.n, block_n)
    blocks, rows = triton.cdiv(N, block_n), triton.cdiv(M, tile.m)
    parts = min(blocks, triton.cdiv(tile.programs, max(rows, 1)))
    return Launch(
        _norm_linear_kernel, (rows * parts,), M, eps, N=N, K=K, CHANNELS=channels,
        HAS_BIAS=has_bias, GELU=gelu, PRECISION='tf32x3' if dtype == torch.float32 else 'tf32',
        BLOCK_M=tile.m, BLOCK_N=block_n, BLOCK_K=block_k, PARTS=parts,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _channels_last(x: Tensor) -> Tensor:
    """The map in channels-last memory; nothing is copied if it is already."""
    return x.contiguous(memory_format=torch.channels_last)


def _empty_map(x: Tensor, stride: int) -> Tensor:
    """Memory for the result of a convolution of x (B, C, H, W), channels-last."""
    B, C, H, W = x.shape
    return x.new_empty(B, -(-H // stride), -(-W // stride), C).permute(0, 3, 1, 2)


def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    grad: Tensor | None = None,
    stride: int = 1,
    gelu: bool = False,
    flip: bool = False,
) -> Tensor:
    """Launch the depth-wise kernel; maps (B, C, H, W), channels-last in memory."""
    x = _channels_last(x)
    out = torch.empty_like(x) if stride == 1 else _empty_map(x, stride)
    strides = weight.stride()
    if strides[2] != 3 * strides[3]:
        weight = weight.contiguous()
        strides = weight.stride()
    flags = flip, bias is not None, grad is not None, gelu
    planned(_plan_depthwise, x.shape, strides, stride, *flags)(
        x, weight, x if bias is None else bias, x if grad is None else _channels_last(grad), out
    )
    return out


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool,
    residual: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor:
    """Launch the linear kernel; x (..., K), weight (N, K, ...), residual and grad (..., N)."""
    x, weight = x.contiguous(), weight.contiguous()
    N = weight.shape[0]
    *rows, K = x.shape
    out = x.new_empty((*rows, N))
    extra = grad if residual is None else residual
    flags = gelu, bias is not None, residual is not None, grad is not None
    planned(_plan_linear, x.numel() // K, N, K, x.dtype, *flags)(
        x, weight, x if bias is None else bias, x if extra is None else extra.contiguous(), out
    )
    return out


def _norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, eps: float, channels: int
) -> Tensor:
    """Launch the linear kernel with normalization; x (..., K), weight (N, K, ...)."""
    x, weight = x.contiguous(), weight.contiguous()
    N = weight.shape[0]
    *rows, K = x.shape
    out = x.new_empty((*rows, N))
    flags = eps, channels, gelu, bias is not None
    planned(_plan_norm_linear, x.numel() // K, N, K, x.dtype, *flags)(
        x, weight, x if bias is None else bias, out
    )
    return out


# ---------------------------------------------------------------------------- operators


@thin_operator(
    'depthwise_gelu(Tensor x, Tensor weight, Tensor? bias, int stride, bool gelu) -> Tensor',
    lambda x, weight, bias, stride, gelu: _empty_map(x, stride),
)
def depthwise_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, gelu: bool
) -> Tensor:
    """:func:`depthwise_gelu` without gradients and checks."""
    return _depthwise(x, weight, bias, stride=stride, gelu=gelu)


@thin_operator(
    'depthwise_gelu_grad(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int stride) -> Tensor',
    lambda grad, x, weight, bias, stride: _empty_map(x, stride),
)
def _depthwise_gelu_grad(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int
) -> Tensor:
    """Gradient of the input of the GELU, which is recomputed."""
    return _depthwise(x, weight, bias, grad, stride=stride)


@thin_operator(
    'depthwise_input_grad(Tensor grad, Tensor weight) -> Tensor',
    lambda grad, weight: _empty_map(grad, 1),
)
def depthwise_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the input of a convolution of stride 1 without GELU, a map (B, C, H, W)."""
    return _depthwise(grad, weight, flip=True)


def _empty_weights(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Memory for gradients of a weight and a bias, in their layout."""
    in_order = weight.stride(2) == 3 * weight.stride(3)
    grad_weight = torch.empty_like(weight) if in_order else weight.new_empty(weight.shape)
    return grad_weight, weight.new_empty(len(weight)) if bias is None else torch.empty_like(bias)


@thin_operator(
    'depthwise_weight_grad(Tensor grad, Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)',
    _empty_weights,
)
def depthwise_weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, with the memory layout and data type of these."""
    launch = planned(_plan_depthwise_weight, x.shape)
    C, tile = x.shape[1], launch.constants
    tiles = launch.grid[0] // triton.cdiv(C, tile['BLOCK_C'])
    parts = x.new_empty(tiles, 10, C, dtype=torch.float32)
    launch(_channels_last(x), _channels_last(grad), parts)
    grads = _empty_weights(grad, x, weight, bias)
    add_parts(parts, *grads, (grads[0].stride(3), grads[0].stride(0)))
    return grads


@thin_operator(
    'linear_gelu(Tensor x, Tensor weight, Tensor? bias, bool gelu, Tensor? residual, float? eps, '
    'int? channels=None) -> Tensor',
    lambda x, weight, *_: x.new_empty(*x.shape[:-1], len(weight)),
)
def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool,
    residual: Tensor | None,
    eps: float | None,
    channels: int | None = None,
) -> Tensor:
    """:func:`linear_gelu` without gradients and checks, and with optional layer normalization.

    With ``eps``, rows are normalized first; scale and shift of the normalization are folded into
    the weight, which may be that of a 1x1 convolution. There must be no residual then, and no more
    inputs than the last key of :data:`NORM_TILES`. If ``channels`` is less than K, rows must end
    with zeros, which are excluded from the normalization.
    """
    if eps is None:
        return _linear(x, weight, bias, gelu, residual)
    return _norm_linear(x, weight, bias, gelu, eps, channels or x.shape[-1])


@thin_operator(
    'linear_gelu_grad(Tensor grad, Tensor x, Tensor weight, Tensor? bias) -> Tensor',
    lambda grad, x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)),
)
def _linear_gelu_grad(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Gradient of the input of the GELU, which is recomputed."""
    return _linear(x, weight, bias, gelu=True, grad=grad)


# ---------------------------------------------------------------------------- gradients


class DepthwiseGELU(torch.autograd.Function):
    """See :func:`depthwise_gelu`."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, gelu: bool
    ) -> Tensor:
        """Compute the convolution, keeping only the inputs."""
        ctx.save_for_backward(x, weight, bias)
        ctx.stride, ctx.gelu = stride, gelu
        return depthwise_forward(x, weight, bias, stride, gelu)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors."""
        x, weight, bias = ctx.saved_tensors
        if ctx.gelu or ctx.stride == 1:
            refuse_second_derivatives('depthwise_gelu')
        if ctx.gelu:
            grad = _depthwise_gelu_grad(grad, x, weight, bias, ctx.stride)
        wanted = [*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2]]
        if ctx.stride == 2:  # only in exchanges between streams
            C, weight = len(weight), weight.to(x.dtype)
            options = ([2, 2], [1, 1], [1, 1], False, [0, 0], C)
            grads = torch.ops.aten.convolution_backward(grad, x, weight, [C], *options, wanted)
            return *grads, None, None
        grad_x = grad_weight = grad_bias = None
        if wanted[0]:
            grad_x = depthwise_input_grad(grad, weight)
        if wanted[1] or wanted[2]:
            grad_weight, grad_bias = depthwise_weight_grad(grad, x, weight, bias)
        return grad_x, grad_weight, grad_bias if wanted[2] else None, None, None


class LinearGELU(torch.autograd.Function):
    """See :func:`linear_gelu`."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None
    ) -> Tensor:
        """Compute the layer, keeping only the rows and the parameters."""
        ctx.save_for_backward(x, weight, bias)
        ctx.gelu = gelu
        return linear_forward(x, weight, bias, gelu, residual, None)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors."""
        x, weight, bias = ctx.saved_tensors
        if ctx.gelu:
            refuse_second_derivatives('linear_gelu')
        inner = _linear_gelu_grad(grad, x, weight, bias) if ctx.gelu else grad
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = inner @ weight
        if ctx.needs_input_grad[1]:
            grad_weight = inner.reshape(-1, len(weight)).T @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = inner.reshape(-1, len(weight)).sum(0)
        return grad_x, grad_weight, grad_bias, None, grad if ctx.needs_input_grad[4] else None


# ---------------------------------------------------------------------------- functions


def _check(x: Tensor, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Check data type and shapes: kernels do not, and would access memory out of bounds."""
    if x.dtype not in DTYPES:
        raise ValueError(f'x has data type {x.dtype}: convert it to one of {DTYPES}')
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f'{name} has shape {tuple(tensor.shape)}: expected {shape}')


def depthwise_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, gelu: bool = True
) -> Tensor:
    """Exact GELU of a 3x3 depth-wise convolution, padded with one zero on each side.

    Sums are in float32. There are no second derivatives.

    Args:
        x (Tensor): Map of shape (B, C, H, W), of float32, float16 or bfloat16. It is copied
            unless it is channels-last in memory.
        weight (Tensor): Weight of shape (C, 1, 3, 3). Strides of (1, any, 3 C, C) are read
            fastest.
        bias (Tensor, optional): Bias of shape (C,).
        stride (int): Stride, 1 or 2. Defaults to 1.
        gelu (bool): Whether GELU follows. Defaults to True.

    Returns:
        Tensor: Map of shape (B, C, ceil(H / stride), ceil(W / stride)), channels-last in memory,
        in the data type of the input.

    Raises:
        ValueError: If the stride, a data type or a shape is not supported.
    """
    C = x.shape[1]
    _check(x, weight=(weight, (C, 1, 3, 3)), bias=(bias, (C,)))
    if stride not in (1, 2):
        raise ValueError(f'stride is {stride}: the kernel supports 1 and 2')
    run = DepthwiseGELU.apply if needs_grad(x, weight, bias) else depthwise_forward
    return run(x, weight, bias, stride, gelu)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool = True,
    residual: Tensor | None = None,
) -> Tensor:
    """Exact GELU of a linear layer, plus an optional residual.

    Sums are in float32. There are no second derivatives.

    Args:
        x (Tensor): Rows of shape (..., K), of float32, float16 or bfloat16.
        weight (Tensor): Weight of shape (N, K), of the data type of the input.
        bias (Tensor, optional): Bias of shape (N,).
        gelu (bool): Whether GELU follows. Defaults to True.
        residual (Tensor, optional): Residual of shape (..., N), added after the GELU.

    Returns:
        Tensor: Rows of shape (..., N), in the data type of the input.

    Raises:
        ValueError: If a data type or a shape is not supported.
    """
    N, rows = len(weight), x.shape[:-1]
    _check(x, weight=(weight, (N, x.shape[-1])), bias=(bias, (N,)), residual=(residual, (*rows, N)))
    if weight.dtype != x.dtype:
        raise ValueError(f'weight has data type {weight.dtype}: convert it to {x.dtype} as x')
    if needs_grad(x, weight, bias, residual):
        return LinearGELU.apply(x, weight, bias, gelu, residual)
    return linear_forward(x, weight, bias, gelu, residual, None)

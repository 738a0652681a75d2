"""Triton kernels of folded FFNs: depth-wise convolution and linear layer, each with its GELU.

Importing this module imports Triton and registers the operators ``mmhrformer::depthwise_gelu``
and ``mmhrformer::linear_gelu``; nothing else in the package imports it in advance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter (TRITON_INTERPRET=1) runs kernels on CPU tensors, but not while torch traces.
INTERPRETED = bool(triton.knobs.runtime.interpret)


class DepthwiseTile(NamedTuple):
    """What a program of the depth-wise kernel computes, and with how many warps."""

    rows: int
    cols: int
    channels: int
    warps: int
    stages: int


class LinearTile(NamedTuple):
    """What a program of the linear kernel computes at a time, and with how many warps.

    ``group`` blocks of rows go through all blocks of columns together, so that both operands
    stay in the L2 cache.
    """

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int


# By the width of the output, up to and including the key.
DEPTHWISE_TILES = {
    8: DepthwiseTile(rows=8, cols=8, channels=64, warps=4, stages=1),
    16: DepthwiseTile(rows=16, cols=4, channels=64, warps=2, stages=1),
    1 << 31: DepthwiseTile(rows=16, cols=8, channels=64, warps=4, stages=1),
}
# By the outputs N and inputs K, rounded up to a power of two from 32 to 256.
LINEAR_TILES = {
    (n, k): LinearTile(m=128, n=min(n, 128), k=min(k, 64), group=1, warps=4, stages=3)
    for n in (32, 64, 128, 256)
    for k in (32, 64, 128, 256)
}


# ---------------------------------------------------------------------------- kernels


@triton.jit
def _normal_tail(x):
    """1 - Phi(|x|) for the distribution function Phi, and exp(-x^2 / 2).

    By a polynomial that is off by 7e-8 at most, as 1 + erf(x) rounded to float32 is, in half of
    the instructions of CUDA's erf, which would take longer than the memory.
    """
    # The square of a reciprocal root takes 2 instructions, a division 9.
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
    """``sum`` first, so that each product is one instruction with its addition."""
    return sum + x0 * w0 + x1 * w1 + x2 * w2


@triton.jit
def _taps(weight, c, in_c, first, W_C: tl.constexpr, W_TAP: tl.constexpr, STEP: tl.constexpr):
    """Three taps (BLOCK_C,) in a row of the window, from ``first`` on in steps of STEP."""
    at = weight + c * W_C + first * W_TAP
    left = tl.load(at, mask=in_c, other=0.0).to(tl.float32)
    middle = tl.load(at + STEP * W_TAP, mask=in_c, other=0.0).to(tl.float32)
    right = tl.load(at + 2 * STEP * W_TAP, mask=in_c, other=0.0).to(tl.float32)
    return left[None, :], middle[None, :], right[None, :]


@triton.jit
def _row(x, y, col, c, in_c, H, W, C: tl.constexpr):
    """The tiles (COLS, BLOCK_C) that the three taps of a row of the window see in row y."""
    at = x + (y * W + col)[:, None] * C + c[None, :]
    mask = ((y >= 0) & (y < H) & (col < W))[:, None] & in_c[None, :]
    middle = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    # The neighbors come from the L1 cache.
    mask = ((y >= 0) & (y < H) & (col >= 1) & (col <= W))[:, None] & in_c[None, :]
    left = tl.load(at - C, mask=mask, other=0.0).to(tl.float32)
    mask = ((y >= 0) & (y < H) & (col < W - 1))[:, None] & in_c[None, :]
    right = tl.load(at + C, mask=mask, other=0.0).to(tl.float32)
    return left, middle, right


@triton.jit(do_not_specialize=['H', 'W', 'OH', 'OW'])
def _depthwise_kernel(
    x, weight, bias, grad, out, H, W, OH, OW,
    C: tl.constexpr, W_C: tl.constexpr, W_TAP: tl.constexpr, STRIDE: tl.constexpr,
    FLIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GRAD: tl.constexpr, GELU: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """gelu(conv3x3(x) + bias) of a map (B, H, W, C), or grad * gelu'(conv3x3(x) + bias).

    A program goes down ROWS rows of the output. An input row is read once, adds to all the
    output rows that it touches, and is forgotten.
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
    # Flipped, the kernel is the gradient of the one that is not.
    STEP: tl.constexpr = -1 if FLIP else 1
    a0, a1, a2 = _taps(weight, c, in_c, 8 if FLIP else 0, W_C, W_TAP, STEP)
    b0, b1, b2 = _taps(weight, c, in_c, 5 if FLIP else 3, W_C, W_TAP, STEP)
    c0, c1, c2 = _taps(weight, c, in_c, 2 if FLIP else 6, W_C, W_TAP, STEP)
    start = tl.zeros((COLS, BLOCK_C), tl.float32)
    if HAS_BIAS:
        start += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    # Sums that lack the lowest row, and for a stride of 1 those that lack the two lowest rows.
    x0, x1, x2 = _row(x, top * STRIDE - 1, col * STRIDE, c, in_c, H, W, C)
    one = _add(start, x0, x1, x2, a0, a1, a2)
    two = start
    if STRIDE == 1:
        x0, x1, x2 = _row(x, top, col, c, in_c, H, W, C)
        one = _add(one, x0, x1, x2, b0, b1, b2)
        two = _add(two, x0, x1, x2, a0, a1, a2)
    for i in tl.range(0, ROWS, num_stages=STAGES):
        y = top + i
        if STRIDE == 2:
            x0, x1, x2 = _row(x, 2 * y, col * 2, c, in_c, H, W, C)
            one = _add(one, x0, x1, x2, b0, b1, b2)
        x0, x1, x2 = _row(x, y * STRIDE + 1, col * STRIDE, c, in_c, H, W, C)
        result = _add(one, x0, x1, x2, c0, c1, c2)
        if STRIDE == 2:
            one = _add(start, x0, x1, x2, a0, a1, a2)
        else:
            one = _add(two, x0, x1, x2, b0, b1, b2)
            two = _add(start, x0, x1, x2, a0, a1, a2)
        at = (y * OW + col)[:, None] * C + c[None, :]
        mask = ((y < OH) & (col < OW))[:, None] & in_c[None, :]
        if HAS_GRAD:
            result = _gelu_slope(result) * tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        elif GELU:
            result = _gelu(result)
        tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['M'])
def _linear_kernel(
    x, weight, bias, extra, out, M,
    N: tl.constexpr, K: tl.constexpr,
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


# ---------------------------------------------------------------------------- launches


def _launch(kernel, programs: int, *args, **options) -> None:
    """Run a kernel on the device of its first argument; with nothing to do, do nothing."""
    if not programs:
        return
    device = args[0].device
    if INTERPRETED or torch.compiler.is_compiling():
        (kernel if INTERPRETED else torch.library.wrap_triton(kernel))[(programs,)](
            *args, **options
        )
        return
    with torch.cuda.device(device):
        kernel[(programs,)](*args, **options)


def _channels_last(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as contiguous (B, H, W, C); nothing is copied if it is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def _tap_strides(weight: Tensor) -> tuple[Tensor, int, int]:
    """A weight (C, 1, 3, 3), and the steps from channel to channel and from tap to tap."""
    if weight.stride(2) != 3 * weight.stride(3):
        weight = weight.contiguous()
    return weight, weight.stride(0), weight.stride(3)


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
    B, H, W, C = x.shape
    OH, OW = -(-H // stride), -(-W // stride)
    out = x.new_empty(B, OH, OW, C)
    weight, channel_step, tap_step = _tap_strides(weight)
    tile = next(tile for width, tile in DEPTHWISE_TILES.items() if OW <= width)
    channels = min(tile.channels, triton.next_power_of_2(C))
    programs = (
        B * triton.cdiv(OH, tile.rows) * triton.cdiv(OW, tile.cols) * triton.cdiv(C, channels)
    )
    _launch(
        _depthwise_kernel, programs, x, weight, x if bias is None else bias,
        x if grad is None else _channels_last(grad), out, H, W, OH, OW,
        C=C, W_C=channel_step, W_TAP=tap_step, STRIDE=stride, FLIP=flip,
        HAS_BIAS=bias is not None, HAS_GRAD=grad is not None, GELU=gelu,
        ROWS=tile.rows, COLS=tile.cols, BLOCK_C=channels, STAGES=tile.stages,
        num_warps=tile.warps,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool,
    residual: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor:
    """Launch the linear kernel; x (..., K), residual and grad (..., N)."""
    x, weight = x.contiguous(), weight.contiguous()
    N, K = weight.shape
    M = x.numel() // K
    out = x.new_empty(*x.shape[:-1], N)
    extra = grad if residual is None else residual
    tile = LINEAR_TILES[tuple(min(max(triton.next_power_of_2(n), 32), 256) for n in (N, K))]
    _launch(
        _linear_kernel, triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),
        x, weight, x if bias is None else bias, x if extra is None else extra.contiguous(), out, M,
        N=N, K=K, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        HAS_GRAD=grad is not None, GELU=gelu,
        PRECISION='tf32x3' if x.dtype == torch.float32 else 'tf32',
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------------- operators


def _operator(name: str) -> Callable[[Callable], Callable]:
    """Register a function as an operator, into which compilers see where torch and they can."""
    transparent = hasattr(torch.library, 'triton_op') and not INTERPRETED
    register = torch.library.triton_op if transparent else torch.library.custom_op
    return register(f'mmhrformer::{name}', mutates_args=())


def _like_output(x: Tensor, stride: int) -> Tensor:
    """An empty map for the depth-wise convolution of x (B, C, H, W), channels-last in memory."""
    B, C, H, W = x.shape
    return x.new_empty(B, -(-H // stride), -(-W // stride), C).permute(0, 3, 1, 2)


@_operator('depthwise_gelu')
def _depthwise_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, gelu: bool
) -> Tensor:
    return _depthwise(x, weight, bias, stride=stride, gelu=gelu)


@_depthwise_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, gelu: bool) -> Tensor:
    return _like_output(x, stride)


@_operator('linear_gelu')
def _linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None
) -> Tensor:
    return _linear(x, weight, bias, gelu, residual)


@_linear_gelu.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def depthwise_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, gelu: bool = True
) -> Tensor:
    """3x3 depth-wise convolution, padded with one zero on each side, and exact GELU in one pass.

    Args:
        x (Tensor): Map of shape (B, C, H, W), of float32, float16 or bfloat16. It is copied
            unless it is channels-last in memory.
        weight (Tensor): Weight of shape (C, 1, 3, 3).
        bias (Tensor, optional): Bias of shape (C,).
        stride (int): Stride, 1 or 2. Defaults to 1.
        gelu (bool): Whether GELU follows. Defaults to True.

    Returns:
        Tensor: Map of shape (B, C, ceil(H / stride), ceil(W / stride)), channels-last in memory,
        of the data type of the input.
    """
    return _depthwise_gelu(x, weight, bias, stride, gelu)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool = True,
    residual: Tensor | None = None,
) -> Tensor:
    """``gelu(linear(x)) + residual`` in one pass.

    Args:
        x (Tensor): Rows of shape (..., K), of float32, float16 or bfloat16.
        weight (Tensor): Weight of shape (N, K).
        bias (Tensor, optional): Bias of shape (N,).
        gelu (bool): Whether exact GELU follows. Defaults to True.
        residual (Tensor, optional): What to add afterwards, of shape (..., N).

    Returns:
        Tensor: Rows of shape (..., N), of the data type of the input.
    """
    return _linear_gelu(x, weight, bias, gelu, residual)

"""Triton kernels of 3x3 depth-wise convolutions, optionally fused with GELU, and of gradients.

Import this only where Triton can run: it registers the operator ``mmhrformer::depthwise_gelu``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .state import needs_grad
from .triton_gelu import gelu
from .triton_launch import Launch, planned
from .triton_sums import add_parts
from .triton_support import channels_last, check_tensors, refuse_second_derivatives, thin_operator


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


# By the width of the output, up to and including the key. Microseconds on an H200, batch 64, bf16:
# 64x48x128 takes 50 (torch 154), 64x48x312 116 (359), 16x12x512 13 (39).
DEPTHWISE_TILES = {
    8: DepthwiseTile(rows=8, cols=8, channels=64, warps=4),
    16: DepthwiseTile(rows=16, cols=4, channels=128, warps=4),
    1 << 31: DepthwiseTile(rows=32, cols=8, channels=64, warps=4, ahead=False, stages=3),
}


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
    x, weight, bias, out, H, W, OH, OW,
    C: tl.constexpr, W_C: tl.constexpr, W_TAP: tl.constexpr, STRIDE: tl.constexpr,
    FLIP: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """conv3x3(x) + bias of a map (B, H, W, C), and its GELU.

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
        if GELU:
            result = gelu(result)
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


# ---------------------------------------------------------------------------- launches


def _tiling(B: int, H: int, W: int, C: int) -> tuple[DepthwiseTile, int, int, int]:
    """The tile for a map, the channels of a block, and the numbers of tiles and blocks."""
    tile = next(tile for width, tile in DEPTHWISE_TILES.items() if width >= W)
    block = min(tile.channels, triton.next_power_of_2(C))
    tiles = B * triton.cdiv(H, tile.rows) * triton.cdiv(W, tile.cols)
    return tile, block, tiles, triton.cdiv(C, block)


def _plan_depthwise(
    shape: tuple[int, ...], strides: tuple[int, ...], stride: int, flip: bool,
    has_bias: bool, gelu: bool,
) -> Launch:  # fmt: skip
    """The launch for a map (B, C, H, W) and a weight of given strides."""
    B, C, H, W = shape
    OH, OW = triton.cdiv(H, stride), triton.cdiv(W, stride)
    tile, block, tiles, blocks = _tiling(B, OH, OW, C)
    return Launch(
        _depthwise_kernel, (tiles * blocks,), H, W, OH, OW,
        C=C, W_C=strides[0], W_TAP=strides[3], STRIDE=stride, FLIP=flip,
        HAS_BIAS=has_bias, GELU=gelu,
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


def _empty_map(x: Tensor, stride: int) -> Tensor:
    """Memory for the result of a convolution of x (B, C, H, W), channels-last."""
    B, C, H, W = x.shape
    return x.new_empty(B, -(-H // stride), -(-W // stride), C).permute(0, 3, 1, 2)


def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    gelu: bool = False,
    flip: bool = False,
) -> Tensor:
    """Launch the depth-wise kernel; maps (B, C, H, W), channels-last in memory."""
    x = channels_last(x)
    out = torch.empty_like(x) if stride == 1 else _empty_map(x, stride)
    strides = weight.stride()
    if strides[2] != 3 * strides[3]:
        weight = weight.contiguous()
        strides = weight.stride()
    launch = planned(_plan_depthwise, x.shape, strides, stride, flip, bias is not None, gelu)
    launch(x, weight, x if bias is None else bias, out)
    return out


# ---------------------------------------------------------------------------- operators


@thin_operator(
    'depthwise_gelu(Tensor x, Tensor weight, Tensor? bias, int stride, bool gelu) -> Tensor',
    lambda x, weight, bias, stride, gelu: _empty_map(x, stride),
)
def depthwise_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, gelu: bool
) -> Tensor:
    """Convolve (B, C, H, W), optionally with GELU, see :func:`depthwise_conv`.

    There are neither gradients nor checks.
    """
    return _depthwise(x, weight, bias, stride, gelu)


@thin_operator(
    'depthwise_input_grad(Tensor grad, Tensor weight) -> Tensor',
    lambda grad, weight: _empty_map(grad, 1),
)
def depthwise_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the input of a convolution of stride 1, a map (B, C, H, W)."""
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
    launch(channels_last(x), channels_last(grad), parts)
    grads = _empty_weights(grad, x, weight, bias)
    add_parts(parts, *grads, (grads[0].stride(3), grads[0].stride(0)))
    return grads


# ---------------------------------------------------------------------------- gradients


class DepthwiseConv(torch.autograd.Function):
    """See :func:`depthwise_conv`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        """Compute the convolution, keeping only the map and the parameters."""
        ctx.save_for_backward(x, weight, bias)
        ctx.stride = stride
        return depthwise_forward(x, weight, bias, stride, False)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors."""
        x, weight, bias = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2]]
        if ctx.stride == 2:  # only in exchanges between streams
            C, weight = len(weight), weight.to(x.dtype)
            options = ([2, 2], [1, 1], [1, 1], False, [0, 0], C)
            grads = torch.ops.aten.convolution_backward(grad, x, weight, [C], *options, wanted)
            return *grads, None
        refuse_second_derivatives('depthwise_conv')
        grad_x = grad_weight = grad_bias = None
        if wanted[0]:
            grad_x = depthwise_input_grad(grad, weight)
        if wanted[1] or wanted[2]:
            grad_weight, grad_bias = depthwise_weight_grad(grad, x, weight, bias)
        return grad_x, grad_weight, grad_bias if wanted[2] else None, None


# ---------------------------------------------------------------------------- functions


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    C = x.shape[1]
    check_tensors(x, weight=(weight, (C, 1, 3, 3)), bias=(bias, (C,)))


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """3x3 depth-wise convolution, padded with one zero on each side.

    Sums are in float32. There are no second derivatives for stride 1.

    Args:
        x (Tensor): Map of shape (B, C, H, W), of float32, float16 or bfloat16. It is copied
            unless it is channels-last in memory.
        weight (Tensor): Weight of shape (C, 1, 3, 3). Strides of (1, any, 3 C, C) are read
            fastest.
        bias (Tensor, optional): Bias of shape (C,).
        stride (int): Stride, 1 or 2. Defaults to 1.

    Returns:
        Tensor: Map of shape (B, C, ceil(H / stride), ceil(W / stride)), channels-last in memory,
        in the data type of the input.

    Raises:
        ValueError: If the stride, a data type or a shape is not supported.
    """
    _check(x, weight, bias)
    if stride not in (1, 2):
        raise ValueError(f'stride is {stride}: the kernel supports 1 and 2')
    if needs_grad(x, weight, bias):
        return DepthwiseConv.apply(x, weight, bias, stride)
    return depthwise_forward(x, weight, bias, stride, False)


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Exact GELU of a convolution of stride 1, see :func:`depthwise_conv`; without gradients."""
    _check(x, weight, bias)
    return depthwise_forward(x, weight, bias, 1, True)

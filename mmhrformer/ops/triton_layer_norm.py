"""Layer normalization of the last axis in Triton.

torch gives each row a block of threads, most of which are idle on rows of 32 to 312 numbers: it
takes 10 to 30 times as long as the memory traffic. Here a program processes many rows. It reads and
writes each number once, and the backward pass recomputes mean and variance from the input. The
gradients of weight and bias are summed in an order that depends on sizes only, so they are
deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .state import needs_grad
from .triton_launch import Launch, planned
from .triton_sums import add_parts
from .triton_support import DTYPES, refuse_second_derivatives, thin_operator

__all__ = ['MAX_CHANNELS', 'fork_layer_norm', 'layer_norm']

# For each kernel: elements of a tile, warps.
LAUNCH = {'forward': (4096, 4), 'backward': (4096, 4)}
# Maximum number of programs of the backward kernel: what an H100 runs at once. A program takes at
# least MIN_TILES tiles, which pays for writing its part of the gradients of weight and bias.
PROGRAMS = 1024
MIN_TILES = 4
# Rows are read in blocks of columns of one of these widths: the one that leaves the fewest columns
# empty, or the widest that leaves less than an eighth empty. 78 numbers are 5 x 16, for which the
# forward kernel takes 13 instructions per number instead of 49 with one block of 128, and the
# backward kernel 25 instead of 90. Few threads share a row, so sums over it take few exchanges; in
# wider blocks, warps would share rows and wait for each other. Narrower blocks are for shorter rows
# only, since memory moves 32 bytes at a time.
WIDTHS = (64, 32, 16)
NARROW = 8
MAX_CHANNELS = 1024


@triton.jit
def _load(x, at, row, col, C: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of C numbers as column blocks (BLOCK_R, WIDTH), in float32."""
    blocks = ()
    for i in tl.static_range(BLOCKS):
        mask = row & (col + i * WIDTH < C)[None, :]
        v = tl.load(x + at + i * WIDTH, mask=mask, other=0.0).to(tl.float32)
        blocks = blocks + (v,)
    return blocks


@triton.jit
def _vector(
    x, default: tl.constexpr, col, C: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):
    """C numbers as blocks (1, WIDTH) in float32, filled with a default if ``x`` is None."""
    blocks = ()
    for i in tl.static_range(BLOCKS):
        v = tl.full((WIDTH,), default, tl.float32)
        if x is not None:
            v = tl.load(x + col + i * WIDTH, mask=col + i * WIDTH < C, other=0.0).to(tl.float32)
        blocks = blocks + (v[None, :],)
    return blocks


@triton.jit
def _mean(blocks, C: tl.constexpr, BLOCKS: tl.constexpr):
    """Means of rows, of shape (BLOCK_R, 1)."""
    total = blocks[0]
    for i in tl.static_range(1, BLOCKS):
        total += blocks[i]
    return (tl.sum(total, 1) / C)[:, None]


@triton.jit
def _mean_of_products(a, b, C: tl.constexpr, BLOCKS: tl.constexpr):
    """Means of products in rows, of shape (BLOCK_R, 1)."""
    total = a[0] * b[0]
    for i in tl.static_range(1, BLOCKS):
        total += a[i] * b[i]
    return (tl.sum(total, 1) / C)[:, None]


@triton.jit
def _center(x, mean, col, C: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows minus their means, zero beyond the last column."""
    blocks = ()
    for i in tl.static_range(BLOCKS):
        v = x[i] - mean
        if (i + 1) * WIDTH > C:
            v = tl.where((col + i * WIDTH < C)[None, :], v, 0.0)
        blocks = blocks + (v,)
    return blocks


@triton.jit(do_not_specialize=['R'])
def _forward(
    x, weight, bias, out, eps, R,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(x - mean) / sqrt(var + eps) * weight + bias."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    row, col = tl.arange(0, BLOCK_R), tl.arange(0, WIDTH)
    at = row[:, None] * C + col[None, :]
    row = (row < R - first)[:, None]
    x += first * C
    out += first * C
    v = _load(x, at, row, col, C, BLOCKS, WIDTH)
    v = _center(v, _mean(v, C, BLOCKS), col, C, BLOCKS, WIDTH)
    rstd = tl.rsqrt(_mean_of_products(v, v, C, BLOCKS) + eps)
    w = _vector(weight, 1.0, col, C, BLOCKS, WIDTH)
    b = _vector(bias, 0.0, col, C, BLOCKS, WIDTH)
    for i in tl.static_range(BLOCKS):
        mask = row & (col + i * WIDTH < C)[None, :]
        result = v[i] * rstd * w[i] + b[i]
        tl.store(out + at + i * WIDTH, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['R'])
def _backward(
    grad, x, weight, skip, out, parts, eps, R,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradient of the input, plus that of its skip connection (``skip``). Each program's share of
    the gradients of weight and bias is written to ``parts`` (programs, 2, C).
    """
    row, col = tl.arange(0, BLOCK_R), tl.arange(0, WIDTH)
    at = row[:, None] * C + col[None, :]
    w = _vector(weight, 1.0, col, C, BLOCKS, WIDTH)
    sum_w, sum_b = (), ()
    for _ in tl.static_range(BLOCKS):
        sum_w = sum_w + (tl.zeros((BLOCK_R, WIDTH), tl.float32),)
        sum_b = sum_b + (tl.zeros((BLOCK_R, WIDTH), tl.float32),)
    tile = tl.program_id(0).to(tl.int64)
    while tile * BLOCK_R < R:
        first = tile * BLOCK_R
        in_r = (row < R - first)[:, None]
        v = _load(x + first * C, at, in_r, col, C, BLOCKS, WIDTH)
        g = _load(grad + first * C, at, in_r, col, C, BLOCKS, WIDTH)
        v = _center(v, _mean(v, C, BLOCKS), col, C, BLOCKS, WIDTH)
        rstd = tl.rsqrt(_mean_of_products(v, v, C, BLOCKS) + eps)
        new_w, new_b, scaled = (), (), ()
        for i in tl.static_range(BLOCKS):
            new_w = new_w + (sum_w[i] + g[i] * (v[i] * rstd),)
            new_b = new_b + (sum_b[i] + g[i],)
            scaled = scaled + (g[i] * w[i],)
        sum_w, sum_b = new_w, new_b
        mean = _mean(scaled, C, BLOCKS)
        slope = _mean_of_products(scaled, v, C, BLOCKS) * rstd * rstd
        for i in tl.static_range(BLOCKS):
            mask = in_r & (col + i * WIDTH < C)[None, :]
            result = (scaled[i] - mean - v[i] * slope) * rstd
            if skip is not None:
                other = tl.load(skip + first * C + at + i * WIDTH, mask=mask, other=0.0)
                result += other.to(tl.float32)
            result = result.to(out.dtype.element_ty)
            tl.store(out + first * C + at + i * WIDTH, result, mask=mask)
        tile += tl.num_programs(0)
    if parts is not None:
        parts += tl.program_id(0) * (2 * C) + col
        for i in tl.static_range(BLOCKS):
            in_c = col + i * WIDTH < C
            tl.store(parts + i * WIDTH, tl.sum(sum_w[i], 0), mask=in_c)
            tl.store(parts + C + i * WIDTH, tl.sum(sum_b[i], 0), mask=in_c)


def _tiling(name: str, rows: int, C: int) -> tuple[int, dict[str, int]]:
    """Number of programs and constants of a kernel over a matrix."""
    elements, warps = LAUNCH[name]
    width = NARROW
    if C // WIDTHS[-1] > 1:
        width = min(WIDTHS, key=lambda width: max(-C % width, C // 8))
    blocks = -(-C // width)
    block_r = 1 << max(0, (elements // (blocks * width)).bit_length() - 1)
    programs = -(-rows // block_r)
    if name == 'backward':
        programs = min(PROGRAMS, -(-programs // MIN_TILES))
    constants = dict(C=C, BLOCK_R=block_r, BLOCKS=blocks, WIDTH=width, num_warps=warps)
    return programs, constants


def _plan(name: str, rows: int, C: int, eps: float) -> Launch:
    """The launch of a kernel over a matrix."""
    programs, constants = _tiling(name, rows, C)
    kernel = dict(forward=_forward, backward=_backward)[name]
    return Launch(kernel, (programs,), eps, rows, **constants)


@thin_operator(
    'layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor',
    lambda x, weight, bias, eps, dtype: torch.empty_like(x, dtype=dtype),
)
def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """The normalized rows of a contiguous tensor (..., C), in a data type."""
    out, C = torch.empty_like(x, dtype=dtype), x.shape[-1]
    planned(_plan, 'forward', x.numel() // C, C, eps)(x, weight, bias, out)
    return out


def _empty_grads(x: Tensor, weight: Tensor | None, of_parameters: bool) -> list[Tensor]:
    """Memory for gradients of rows, weight and bias; the last two are empty if not needed."""
    dtype = torch.float32 if weight is None else weight.dtype
    size = x.shape[-1] if of_parameters else 0
    return [torch.empty_like(x), *(x.new_empty(size, dtype=dtype) for _ in range(2))]


@thin_operator(
    'layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? skip, float eps, '
    'bool of_parameters) -> (Tensor, Tensor, Tensor)',
    lambda grad, x, weight, skip, eps, of_parameters: tuple(_empty_grads(x, weight, of_parameters)),
)
def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, skip: Tensor | None, eps: float,
    of_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of rows (..., C), weight and bias.

    ``skip`` is added to the first; the others are empty if not needed.
    """
    out, *grads = _empty_grads(x, weight, of_parameters)
    launch, parts = planned(_plan, 'backward', x.numel() // x.shape[-1], x.shape[-1], eps), None
    if of_parameters:
        parts = x.new_empty((launch.grid[0], 2, x.shape[-1]), dtype=torch.float32)
    launch(grad, x, weight, skip, out, parts)
    if of_parameters:
        add_parts(parts, *grads)
    return out, *grads


class LayerNorm(torch.autograd.Function):
    """See :func:`layer_norm` and :func:`fork_layer_norm`."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Normalize, keeping only the input and the weight."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return forward(x, weight, bias, eps, dtype), x

    @staticmethod
    def backward(ctx, grad: Tensor | None, skip: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the rows, the weight and the bias."""
        refuse_second_derivatives('layer_norm')
        if grad is None:
            return skip, None, None, None, None
        _, of_weight, of_bias, *_ = ctx.needs_input_grad
        tensors = (None if t is None else t.contiguous() for t in (grad, *ctx.saved_tensors, skip))
        grad_x, *grads = backward(*tensors, ctx.eps, of_weight or of_bias)
        return grad_x, grads[0] if of_weight else None, grads[1] if of_bias else None, None, None


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Layer normalization that keeps only ``x`` and ``weight`` for the backward pass.

    The arithmetic is in float32 for all data types, and the result is rounded once. There are no
    second derivatives.

    Args:
        x (Tensor): Rows of shape (..., C), in float32, float16 or bfloat16; copied if not
            contiguous.
        weight (Tensor, optional): Weight of shape (C,), in float32 or the data type of ``x``.
        bias (Tensor, optional): Bias of shape (C,), in float32 or the data type of ``x``.
        eps (float): Added to the variance.
        dtype (torch.dtype, optional): Data type of the result, one of the three. Defaults to
            None: that of ``x``.

    Returns:
        Tensor: Normalized rows of shape (..., C).

    Raises:
        ValueError: If a data type is not supported, or if rows are longer than 1024.

    Examples:
        >>> x = torch.rand(2, 8, 6, 32, device='cuda')  # doctest: +SKIP
        >>> layer_norm(x, x.new_ones(32), x.new_zeros(32), 1e-6).shape  # doctest: +SKIP
        torch.Size([2, 8, 6, 32])
    """
    return fork_layer_norm(x, weight, bias, eps, dtype)[0]


def fork_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`layer_norm`, and ``x`` for a path around what follows.

    In the backward pass the gradients of both ways are added where that of the first is computed.
    """
    dtype = dtype or x.dtype
    for name, given in (('x', x.dtype), ('dtype', dtype)):
        if given not in DTYPES:
            raise ValueError(f'{name} is {given}: choose one of {DTYPES}')
    if x.shape[-1] > MAX_CHANNELS:
        raise ValueError(
            f'x of shape {tuple(x.shape)} has rows of more than {MAX_CHANNELS} numbers: use '
            'torch.nn.functional.layer_norm, which is fast on long rows'
        )
    x = x.contiguous()
    if needs_grad(x, weight, bias):
        return LayerNorm.apply(x, weight, bias, eps, dtype)
    return forward(x, weight, bias, eps, dtype), x

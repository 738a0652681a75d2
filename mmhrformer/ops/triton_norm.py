"""Batch normalization and GELU of channels-last maps in Triton.

The kernels are bound by memory: a map is read twice and written once in a forward pass, read four
times and written once in a backward pass, and only the input map is kept between them. Import this
module only where Triton is installed.

A map (B, C, H, W) is a matrix (B * H * W, C) here. Sums over its rows are computed in two steps,
one partial result per program and then their combination, in an order that depends on sizes only,
so they are deterministic. Moments are triples (count, mean, sum of squared deviations from it),
which combine across programs and processes without loss of accuracy.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Launch, planned
from .triton_sums import add_parts
from .triton_support import channels_last, refuse_second_derivatives, thin_operator

__all__ = ['batch_statistics', 'normalize_gelu']

# For each kernel over maps: elements of a tile, maximum number of programs, warps.
LAUNCH = {
    'moments': (4096, 1024, 4),
    'normalize': (4096, 4096, 4),
    'gradient_sums': (4096, 1024, 4),
    'input_gradient': (2048, 4096, 4),
}
# Columns of a tile: the number that leaves the fewest of them empty, or the largest that leaves
# less than a sixteenth empty.
COLUMNS = (128, 64, 32)
# The kernel that combines moments: how many at a time, of how many channels, warps.
COMBINE = (128, 16, 8)


@triton.jit
def _place(
    R, COLS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr
):
    """Addresses of the first tile of a program, its rows and columns, and the rows left."""
    first = tl.program_id(1).to(tl.int64) * (TILES * BLOCK_R)
    row = tl.arange(0, BLOCK_R)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = (first + row)[:, None] * COLS + col[None, :]
    left = tl.minimum(tl.maximum(R - first, 0), TILES * BLOCK_R).to(tl.int32)
    return at, row, col, left


@triton.jit
def _affine(count, mean, spread, weight, bias, eps, c, in_c, TRAINING: tl.constexpr):
    """Mean, reciprocal standard deviation, factor and bias of channels."""
    m = tl.load(mean + c, mask=in_c, other=0.0).to(tl.float32)
    var = tl.load(spread + c, mask=in_c, other=0.0).to(tl.float32)
    if TRAINING:
        var /= tl.load(count + c, mask=in_c, other=1.0)
    w = tl.load(weight + c, mask=in_c, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)
    invstd = tl.rsqrt(var + eps)
    return m, invstd, w * invstd, b


@triton.jit
def _phi(z):
    """Distribution function of the normal distribution, and its density times sqrt(2 pi).

    Formula 7.1.26 of Abramowitz and Stegun. The error is at most 7.5e-8, the resolution of float32
    near 1. With the shared exponential, a loop over gradients takes 28 instructions per element; it
    takes 51 with ``tl.erf``, which would make it slower than the memory.
    """
    e = tl.exp2(-0.72134752 * z * z)
    t = 1.0 + 0.23164188 * tl.abs(z)
    t = tl.rsqrt(t * t)  # a reciprocal in two instructions, not seven
    q = 0.5307027 * t - 0.72657603
    q = q * t + 0.7107069
    q = q * t - 0.14224837
    q = q * t + 0.12741479
    q = q * t * e
    return tl.where(z < 0, q, 1.0 - q), e


@triton.jit
def _gelu(z):
    """GELU, and its derivative."""
    phi, e = _phi(z)
    return z * phi, phi + z * e * 0.3989422804014327


@triton.jit(do_not_specialize=['R'])
def _moments(
    x, parts, R, C: tl.constexpr, COLS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Moments of the channels in a program's rows, written to ``parts`` (parts, 3, C).

    Values are shifted by the mean of the first tile; otherwise, the variance of a channel with a
    large mean would be lost to cancellation.
    """
    at, row, col, left = _place(R, COLS, BLOCK_R, BLOCK_C, TILES)
    in_c = col < COLS
    mask = (row < left)[:, None] & in_c[None, :]
    shift = tl.sum(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), 0)
    shift = shift / tl.maximum(tl.minimum(left, BLOCK_R), 1)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(TILES):
        mask = (row + i * BLOCK_R < left)[:, None] & in_c[None, :]
        v = tl.load(x + at + i * BLOCK_R * COLS, mask=mask, other=0.0).to(tl.float32)
        v = tl.where(mask, v - shift[None, :], 0.0)
        total += v
        square += v * v
    n = tl.maximum(left, 1).to(tl.float32)
    delta = tl.sum(total, 0) / n
    m2 = tl.sum(square, 0) - delta * delta * n
    part = tl.program_id(1) * (COLS // C) + col // C
    out = parts + part * (3 * C) + col % C
    tl.store(out, tl.zeros((BLOCK_C,), tl.float32) + left, mask=in_c)
    tl.store(out + C, shift + delta, mask=in_c)
    tl.store(out + 2 * C, tl.where(m2 < 0, 0.0, m2), mask=in_c)


@triton.jit(do_not_specialize=['P'])
def _combine(
    parts, out, running_mean, running_var, tracked, momentum, P, C,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """Combine moments ``parts`` (P, 3, C) to (3, C), and update the running statistics and
    ``tracked``, the number of updates.
    """
    p = tl.arange(0, BLOCK_P)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    at = parts + p[:, None] * (3 * C) + c[None, :]
    mask = (p < P)[:, None] & in_c[None, :]
    n = tl.load(at, mask=mask, other=0.0)
    mean = tl.load(at + C, mask=mask, other=0.0)
    shift = tl.sum(n * mean, 0) / tl.maximum(tl.sum(n, 0), 1.0)
    count = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(TILES):
        mask = (p + i * BLOCK_P < P)[:, None] & in_c[None, :]
        here = at + i * BLOCK_P * 3 * C
        n = tl.load(here, mask=mask, other=0.0)
        d = tl.load(here + C, mask=mask, other=0.0) - shift[None, :]
        count += n
        total += n * d
        square += tl.load(here + 2 * C, mask=mask, other=0.0) + n * d * d
    N = tl.sum(count, 0)
    delta = tl.sum(total, 0) / tl.maximum(N, 1.0)
    mean = shift + delta
    m2 = tl.sum(square, 0) - N * delta * delta
    m2 = tl.where(m2 < 0, 0.0, m2)
    tl.store(out + c, N, mask=in_c)
    tl.store(out + C + c, mean, mask=in_c)
    tl.store(out + 2 * C + c, m2, mask=in_c)
    if UPDATE:
        old = tl.load(running_mean + c, mask=in_c, other=0.0).to(tl.float32)
        new = old + momentum * (mean - old)
        tl.store(running_mean + c, new.to(running_mean.dtype.element_ty), mask=in_c)
        old = tl.load(running_var + c, mask=in_c, other=0.0).to(tl.float32)
        new = old + momentum * (m2 / (N - 1) - old)
        tl.store(running_var + c, new.to(running_var.dtype.element_ty), mask=in_c)
    if tracked is not None:
        tl.store(tracked, tl.load(tracked) + 1, mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=['R'])
def _normalize(
    x, count, mean, spread, weight, bias, out, eps, R, C: tl.constexpr, COLS: tl.constexpr,
    TRAINING: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """gelu((x - mean) / sqrt(var + eps) * weight + bias)."""
    at, row, col, left = _place(R, COLS, BLOCK_R, BLOCK_C, TILES)
    in_c = col < COLS
    m, _, w, b = _affine(count, mean, spread, weight, bias, eps, col % C, in_c, TRAINING)
    for i in range(TILES):
        mask = (row + i * BLOCK_R < left)[:, None] & in_c[None, :]
        here = at + i * BLOCK_R * COLS
        v = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        v = _gelu((v - m[None, :]) * w[None, :] + b[None, :])[0]
        tl.store(out + here, v.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['R'])
def _gradient_sums(
    grad, x, count, mean, spread, weight, bias, parts, out, eps, R,
    C: tl.constexpr, COLS: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A program's share of the gradients of bias and weight, to ``parts`` (parts, 2, C), and the
    recomputed result of the forward pass to ``out``, if needed.
    """
    at, row, col, left = _place(R, COLS, BLOCK_R, BLOCK_C, TILES)
    in_c = col < COLS
    m, invstd, w, b = _affine(count, mean, spread, weight, bias, eps, col % C, in_c, TRAINING)
    sum_b = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_w = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(TILES):
        mask = (row + i * BLOCK_R < left)[:, None] & in_c[None, :]
        here = at + i * BLOCK_R * COLS
        g = tl.load(grad + here, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        v -= m[None, :]
        y, slope = _gelu(v * w[None, :] + b[None, :])
        g *= slope
        if out is not None:
            tl.store(out + here, y.to(out.dtype.element_ty), mask=mask)
        sum_b += g
        sum_w += g * v
    part = tl.program_id(1) * (COLS // C) + col // C
    parts += part * (2 * C) + col % C
    tl.store(parts, tl.sum(sum_b, 0), mask=in_c)
    tl.store(parts + C, tl.sum(sum_w, 0) * invstd, mask=in_c)


@triton.jit(do_not_specialize=['R'])
def _input_gradient(
    grad, x, count, mean, spread, weight, bias, sums, out, eps, R,
    C: tl.constexpr, COLS: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradient of the map; ``sums`` (2, C) are those of bias and weight over all rows."""
    at, row, col, left = _place(R, COLS, BLOCK_R, BLOCK_C, TILES)
    in_c = col < COLS
    c = col % C
    m, invstd, w, b = _affine(count, mean, spread, weight, bias, eps, c, in_c, TRAINING)
    mean_b = tl.zeros((BLOCK_C,), tl.float32)
    mean_w = tl.zeros((BLOCK_C,), tl.float32)
    if TRAINING:
        n = tl.load(count + c, mask=in_c, other=1.0)
        mean_b = tl.load(sums + c, mask=in_c, other=0.0) * w / n
        mean_w = tl.load(sums + C + c, mask=in_c, other=0.0) * w * invstd / n
    for i in range(TILES):
        mask = (row + i * BLOCK_R < left)[:, None] & in_c[None, :]
        here = at + i * BLOCK_R * COLS
        g = tl.load(grad + here, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        v -= m[None, :]
        g *= _gelu(v * w[None, :] + b[None, :])[1]
        g = g * w[None, :] - (mean_b[None, :] + v * mean_w[None, :])
        tl.store(out + here, g.to(out.dtype.element_ty), mask=mask)


def _tiling(name: str, rows: int, C: int, size: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid, rows and constants of a kernel over a matrix of elements of ``size`` bytes.

    Rows that are not a multiple of 16 bytes, such as 78 channels, are joined to longer ones that
    are, if the number of rows allows: a thread then loads 16 bytes at a time instead of 4.
    """
    fold = math.gcd(16 // math.gcd(C * size, 16), rows)
    rows, cols = rows // fold, fold * C
    elements, programs, num_warps = LAUNCH[name]
    block_c = min(COLUMNS, key=lambda block: max(-cols % block, cols // 16))
    block_r = elements // block_c
    blocks = triton.cdiv(cols, block_c)
    chunks = max(1, triton.cdiv(rows, block_r))  # a process may have no images
    tiles = triton.next_power_of_2(triton.cdiv(chunks * blocks, programs))
    constants = dict(C=C, COLS=cols, BLOCK_R=block_r, BLOCK_C=block_c, TILES=tiles)
    return (blocks, triton.cdiv(chunks, tiles)), rows, dict(constants, num_warps=num_warps)


KERNELS = dict(normalize=_normalize, gradient_sums=_gradient_sums, input_gradient=_input_gradient)


def _plan(name: str, rows: int, C: int, size: int, *options) -> Launch:
    """The launch of a kernel over a matrix of elements of ``size`` bytes."""
    grid, rows, constants = _tiling(name, rows, C, size)
    if not options:
        return Launch(_moments, grid, rows, **constants)
    eps, training = options
    return Launch(KERNELS[name], grid, eps, rows, TRAINING=training, **constants)


def _launch(name: str, x: Tensor, *options) -> Launch:
    """The launch of a kernel over a map; the options are eps and training."""
    return planned(_plan, name, x.numel() // x.shape[1], x.shape[1], x.element_size(), *options)


def _empty_parts(launch: Launch, x: Tensor, numbers: int) -> Tensor:
    """Memory (parts, numbers, C) for sums over the rows of each program."""
    C = x.shape[1]
    parts = launch.grid[1] * launch.constants['COLS'] // C
    return x.new_empty((parts, numbers, C), dtype=torch.float32)


def _empty_sums(x: Tensor, weight: Tensor, again: bool) -> tuple[Tensor, ...]:
    """Memory for the results of :func:`gradient_sums`."""
    C = x.shape[1]
    total = x.new_empty((2, C), dtype=torch.float32)
    out = torch.empty_like(x) if again else x.new_empty(0)
    return total, weight.new_empty(2, C), x.new_empty(C), out


def _plan_combine(parts: int, C: int, momentum: float, update: bool) -> Launch:
    """The launch that combines moments."""
    block_p, block_c, warps = COMBINE
    # A power of two, to compile fewer kernels.
    tiles = triton.next_power_of_2(triton.cdiv(parts, block_p))
    constants = dict(BLOCK_P=block_p, BLOCK_C=block_c, TILES=tiles, UPDATE=update, num_warps=warps)
    return Launch(_combine, (triton.cdiv(C, block_c),), momentum, parts, C, **constants)


def combine_moments(
    parts: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    momentum: float,
) -> Tensor:
    """Combine the moments of parts of a map.

    Args:
        parts (Tensor): Count, mean and sum of squared deviations, of shape (parts, 3, C).
        running_mean (Tensor, optional): Running mean of shape (C,), updated in place.
        running_var (Tensor, optional): Running variance of shape (C,), updated in place by the
            unbiased variance.
        tracked (Tensor, optional): Number of updates, an integer of shape (), incremented in place.
        momentum (float): Weight of the new statistics.

    Returns:
        Tensor: Moments of shape (3, C).
    """
    P, _, C = parts.shape
    out = parts.new_empty(3, C)
    launch = planned(_plan_combine, P, C, momentum, running_mean is not None)
    launch(parts, out, running_mean, running_var, tracked)
    return out


@thin_operator(
    'batch_norm_moments(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, '
    'Tensor(c!)? tracked, float momentum) -> Tensor',
    lambda x, *_: x.new_empty((3, x.shape[1]), dtype=torch.float32),
)
def moments(x: Tensor, *running) -> Tensor:
    """Moments (3, C) of a channels-last map, see :func:`combine_moments`."""
    launch = _launch('moments', x)
    parts = _empty_parts(launch, x, 3)
    launch(x, parts)
    return combine_moments(parts, *running)


# Count, mean, and sum of squared deviations (in evaluation, the variance); weight and bias.
STATISTICS = 'Tensor count, Tensor mean, Tensor spread, Tensor weight, Tensor bias'
OPTIONS = 'float eps, bool training'


@thin_operator(
    f'batch_norm_normalize(Tensor x, {STATISTICS}, {OPTIONS}) -> Tensor',
    lambda x, *_: torch.empty_like(channels_last(x)),
)
def normalize(x: Tensor, *args) -> Tensor:
    """GELU of the normalized map (B, C, H, W)."""
    *statistics, eps, training = args
    x = channels_last(x)
    out = torch.empty_like(x)
    _launch('normalize', x, eps, training)(x, *statistics, out)
    return out


@thin_operator(
    f'batch_norm_gradient_sums(Tensor grad, Tensor x, {STATISTICS}, {OPTIONS}, bool again)'
    ' -> (Tensor, Tensor, Tensor, Tensor)',
    lambda grad, x, *args: _empty_sums(channels_last(x), args[3], args[-1]),
)
def gradient_sums(grad: Tensor, x: Tensor, *args) -> tuple[Tensor, ...]:
    """Gradients of bias and weight (2, C), in float32 and in their data type, and zeros (C,).

    With ``again`` also what :func:`normalize` returned, else nothing in its place.
    """
    *tensors, eps, training, again = args
    grad, x = channels_last(grad), channels_last(x)
    launch = _launch('gradient_sums', x, eps, training)
    parts = _empty_parts(launch, x, 2)
    total, grads, zeros, out = _empty_sums(x, tensors[-2], again)
    launch(grad, x, *tensors, parts, out if again else None)
    add_parts(parts, *grads, total=total, zeros=zeros)
    return total, grads, zeros, out


@thin_operator(
    f'batch_norm_input_gradient(Tensor grad, Tensor x, {STATISTICS}, Tensor? sums, {OPTIONS})'
    ' -> Tensor',
    lambda grad, x, *_: torch.empty_like(channels_last(x)),
)
def input_gradient(grad: Tensor, x: Tensor, *args) -> Tensor:
    """Gradient of the map (B, C, H, W).

    The sums (2, C) are those of :func:`gradient_sums` over all processes.
    """
    *statistics, sums, eps, training = args
    grad, x = channels_last(grad), channels_last(x)
    out = torch.empty_like(x)
    _launch('input_gradient', x, eps, training)(grad, x, *statistics, sums, out)
    return out


class BatchNormGELU(torch.autograd.Function):
    """See :func:`normalize_gelu`; the options are eps and training."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, statistics: tuple[Tensor, ...],
        group: dist.ProcessGroup | None, *options,
    ) -> Tensor:  # fmt: skip
        """Normalize, keeping the map, the statistics and the parameters."""
        ctx.group, ctx.options = group, options
        ctx.save_for_backward(x, *statistics, weight, bias)
        return normalize(x, *statistics, weight, bias, *options)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the map, the weight and the bias."""
        refuse_second_derivatives('normalize_gelu')
        of_input, *of_affine = ctx.needs_input_grad[:3]
        training, grad_x, grads = ctx.options[1], None, (None, None)
        saved = ctx.saved_tensors
        if training or any(of_affine):
            total, grads, *_ = gradient_sums(grad, *saved, *ctx.options, False)
        if of_input:
            total = share(total, ctx.group) if training else None
            grad_x = input_gradient(grad, *saved, total, *ctx.options)
        return grad_x, grads[1], grads[0], *[None] * 4


def share(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over all processes of a group, in place."""
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


def _gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the moments of all processes, (processes, 3, C)."""
    parts = local.new_empty(dist.get_world_size(group) * len(local), local.shape[1])
    dist.all_gather_into_tensor(parts, local, group)
    return parts.unflatten(0, (-1, len(local)))


def batch_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    process_group: dist.ProcessGroup | None = None,
    tracked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the channel statistics of a map, and update the running ones.

    Args:
        x (Tensor): Map of shape (B, C, H, W), channels-last, of one of :data:`DTYPES`.
        running_mean (Tensor, optional): Running mean of shape (C,).
        running_var (Tensor, optional): Running variance of shape (C,).
        momentum (float): Weight of the new statistics in the running ones.
        process_group (ProcessGroup, optional): Processes that share these statistics, as in
            ``nn.SyncBatchNorm``; they may have maps of different sizes. Defaults to None: none.
        tracked (Tensor, optional): The number of updates, an integer of shape (), is one more.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Count, mean and sum of squared deviations, (C,) each.

    Raises:
        ValueError: If there is only one value per channel.
    """
    if process_group is None:
        if x.numel() == x.shape[1]:
            raise ValueError(
                f'x of shape {tuple(x.shape)} has only one value per channel, so no variance: '
                'use more images, larger ones, or running statistics (evaluation mode)'
            )
        return moments(x, running_mean, running_var, tracked, momentum).unbind()
    parts = _gather(moments(x, None, None, None, momentum), process_group)
    return combine_moments(parts, running_mean, running_var, tracked, momentum).unbind()


def normalize_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    eps: float,
    training: bool,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """GELU of a normalized map, keeping only ``x`` for the backward pass.

    Together with :func:`batch_statistics`, this is batch normalization and GELU: the gradients take
    into account that the statistics depend on the map. They are deterministic. There are no second
    derivatives.

    Args:
        x (Tensor): Map of shape (B, C, H, W), channels-last, of one of :data:`DTYPES`.
        weight (Tensor): Weight of shape (C,).
        bias (Tensor): Bias of shape (C,).
        statistics (tuple[Tensor, Tensor, Tensor]): In training, the result of
            :func:`batch_statistics`; otherwise running mean, running mean and running variance.
        eps (float): Added to the variance.
        training (bool): Whether the statistics are those of the map.
        process_group (ProcessGroup, optional): Processes that share them. Defaults to None: none.

    Returns:
        Tensor: Map of shape (B, C, H, W), channels-last.

    Examples:
        >>> x = torch.rand(2, 32, 8, 6, device='cuda')  # doctest: +SKIP
        >>> x = x.to(memory_format=torch.channels_last)  # doctest: +SKIP
        >>> zeros, ones = x.new_zeros(32), x.new_ones(32)  # doctest: +SKIP
        >>> statistics = batch_statistics(x, zeros.clone(), ones.clone(), 0.1)  # doctest: +SKIP
        >>> normalize_gelu(x, ones, zeros, statistics, 1e-5, True).shape  # doctest: +SKIP
        torch.Size([2, 32, 8, 6])
    """
    return BatchNormGELU.apply(x, weight, bias, statistics, process_group, eps, training)

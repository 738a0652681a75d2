"""Triton kernels of linear layers fused with GELU, residuals and layer normalization.

Import this only where Triton can run: it registers the operator ``mmhrformer::linear_gelu``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_gelu import gelu
from .triton_launch import Launch, planned
from .triton_support import check_tensors, thin_operator


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


@triton.jit(do_not_specialize=['M'])
def _linear_kernel(
    x, weight, bias, residual, out, M, N: tl.constexpr, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """gelu(x W^T + bias) + residual for x (M, K), weight (N, K) and residual (M, N)."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(0) // (GROUP * BLOCKS) * GROUP
    size = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    place = tl.program_id(0) % (GROUP * BLOCKS)
    start = (first + place % size) * BLOCK_M
    n = place // size * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    x += start.to(tl.int64) * K
    out += start.to(tl.int64) * N
    residual += start.to(tl.int64) * N
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
    if GELU:
        acc = gelu(acc)
    if HAS_RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
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
            acc = gelu(acc)
        mask = in_m[:, None] & in_n[None, :]
        tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------- launches


def _plan_linear(
    M: int, N: int, K: int, dtype: torch.dtype, gelu: bool, has_bias: bool, has_residual: bool
) -> Launch:
    """The launch for M rows of K numbers and a weight (N, K)."""
    tile = linear_tile(N, K)
    block_n, block_k = (max(16, triton.next_power_of_2(n)) for n in (N, K))
    block_n = min(tile.n, block_n)
    return Launch(
        _linear_kernel, (triton.cdiv(M, tile.m) * triton.cdiv(N, block_n),), M, N=N, K=K,
        HAS_BIAS=has_bias, HAS_RESIDUAL=has_residual, GELU=gelu,
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


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None
) -> Tensor:
    """Launch the linear kernel; x (..., K), weight (N, K, ...), residual (..., N)."""
    x, weight = x.contiguous(), weight.contiguous()
    N = weight.shape[0]
    *rows, K = x.shape
    out = x.new_empty((*rows, N))
    flags = gelu, bias is not None, residual is not None
    residual = x if residual is None else residual.contiguous()
    launch = planned(_plan_linear, x.numel() // K, N, K, x.dtype, *flags)
    launch(x, weight, x if bias is None else bias, residual, out)
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
    """Linear layer of rows (..., K) to (..., N), optionally with GELU and a residual (..., N).

    There are neither gradients nor checks. With ``eps``, rows are normalized first; scale and shift
    of the normalization are folded into the weight, which may be that of a 1x1 convolution. There
    must be no residual then, and no more inputs than the last key of :data:`NORM_TILES`. If
    ``channels`` is less than K, rows must end with zeros, which are excluded from the
    normalization.
    """
    if eps is None:
        return _linear(x, weight, bias, gelu, residual)
    return _norm_linear(x, weight, bias, gelu, eps, channels or x.shape[-1])


# ---------------------------------------------------------------------------- functions


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Exact GELU of a linear layer.

    Sums are in float32. There are no gradients.

    Args:
        x (Tensor): Rows of shape (..., K), of float32, float16 or bfloat16.
        weight (Tensor): Weight of shape (N, K), of the data type of the input.
        bias (Tensor, optional): Bias of shape (N,).

    Returns:
        Tensor: Rows of shape (..., N), in the data type of the input.

    Raises:
        ValueError: If a data type or a shape is not supported.
    """
    check_tensors(x, weight=(weight, (len(weight), x.shape[-1])), bias=(bias, (len(weight),)))
    if weight.dtype != x.dtype:
        raise ValueError(f'weight has data type {weight.dtype}: convert it to {x.dtype} as x')
    return linear_forward(x, weight, bias, True, None, None)

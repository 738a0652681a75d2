"""Triton kernels, on GPUs, where they fit; else what :mod:`.cuda` has."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import cuda
from .cuda import depthwise_conv, head_padding, window_attention
from .recompute import is_plain, recompute
from .state import autocast_dtype, needs_grad

__all__ = [
    'attends_on_map',
    'conv_gelu',
    'depthwise_conv',
    'head_padding',
    'layer_norm',
    'map_attention',
    'norm_gelu_conv',
    'window_attention',
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 64
MAX_WINDOW = 15


def attends_on_map(x: Tensor, qkv: nn.Module, heads: int, window: int) -> bool:
    """See :func:`mmhrformer.ops.attends_on_map`."""
    return (
        x.dtype in DTYPES
        and window <= MAX_WINDOW
        and is_plain(qkv, nn.Linear)
        and qkv.bias is not None
        and qkv.out_features <= 3 * heads * MAX_HEAD_DIM
    )


def map_attention(
    qkv: Tensor,
    pad: Tensor,
    table: Tensor | None,
    heads: int,
    window: int,
    scale: float,
    pad_mask: bool = False,
) -> Tensor:
    """See :func:`mmhrformer.ops.map_attention`."""
    from .triton_attention import window_attention as kernel

    return kernel(qkv, pad, table, heads, window, scale, pad_mask)


def conv_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """See :func:`mmhrformer.ops.conv_gelu`."""
    from .triton_conv import depthwise_gelu, linear_gelu

    dtype = autocast_dtype(x.device.type) or x.dtype
    x, weight = x.to(dtype), conv.weight.to(dtype)
    bias = conv.bias
    same = conv.stride == (1, 1) and conv.dilation == (1, 1)
    if dtype not in DTYPES or not same or needs_grad(x, weight, bias):
        return cuda.conv_gelu(x, conv)
    if conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding == (0, 0):
        rows = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        return linear_gelu(rows, weight.flatten(1), bias).permute(0, 3, 1, 2)
    if conv.kernel_size == (3, 3) and conv.groups == x.shape[1] and conv.padding == (1, 1):
        return depthwise_gelu(x, weight, bias)
    return cuda.conv_gelu(x, conv)


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """See :func:`mmhrformer.ops.layer_norm`."""
    from .triton_layer_norm import MAX_CHANNELS
    from .triton_layer_norm import layer_norm as kernel

    fits = is_plain(norm, nn.LayerNorm) and norm.normalized_shape == x.shape[-1:]
    dtype = autocast_dtype(x.device.type) or x.dtype
    if not fits or x.dtype not in DTYPES or x.shape[-1] > MAX_CHANNELS:
        return norm(x)
    # Under autocast torch's is float32, which the next layer would read only to round it to the
    # data type that this is in already.
    return kernel(x, norm.weight, norm.bias, norm.eps, dtype)


def norm_gelu_conv(x: Tensor, norm: nn.Module, conv: nn.Module | None = None) -> Tensor:
    """See :func:`mmhrformer.ops.norm_gelu_conv`."""
    if not (is_plain(norm, _BatchNorm) and norm.affine and x.dtype in DTYPES):
        return cuda.norm_gelu_conv(x, norm, conv)
    if conv is None:
        return norm_gelu(x, norm)
    if RECOMPUTE and is_plain(conv, nn.Conv2d) and needs_grad(x, conv.weight):
        return recompute(norm, lambda x: conv(norm_gelu(x, norm)), x, is_random=False)
    return conv(norm_gelu(x, norm))


RECOMPUTE = True


def norm_gelu(x: Tensor, norm: _BatchNorm) -> Tensor:
    """``gelu(norm(x))`` in one kernel, which keeps ``x`` alone for the backward pass."""
    from .triton_norm import batch_norm_gelu

    training = norm.training or norm.running_mean is None
    updates = norm.training and norm.track_running_stats
    momentum = norm.momentum
    if updates and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    mean, var = (norm.running_mean, norm.running_var) if updates or not training else (None, None)
    return batch_norm_gelu(
        x, norm.weight, norm.bias, mean, var, momentum or 0.0, norm.eps, training
    )

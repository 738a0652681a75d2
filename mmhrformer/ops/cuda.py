"""What GPUs need."""

from __future__ import annotations

import torch
from torch import Tensor

from .recompute import norm_gelu_conv
from .reference import attends_on_map, conv_gelu, depthwise_conv, layer_norm
from .sdpa import sdpa

__all__ = [
    'attends_on_map',
    'conv_gelu',
    'depthwise_conv',
    'head_padding',
    'layer_norm',
    'norm_gelu_conv',
    'window_attention',
]

# The attention kernels put the windows on an axis of the grid that has no more places.
MAX_WINDOWS = 65_535
# The fast ones want head dims of a multiple of 8: not the 18 of HRFormer-T, not the 39 of -B.
HEAD_DIM_MULTIPLE = 8


def head_padding(head_dim: int) -> int:
    """Zeros to append to each head."""
    return -head_dim % HEAD_DIM_MULTIPLE


def window_attention(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """See :func:`mmhrformer.ops.window_attention`."""
    padding = head_padding(qkv.shape[-1])
    if len(qkv) <= MAX_WINDOWS:
        return sdpa(qkv, bias, scale, padding)
    parts = qkv.split(MAX_WINDOWS)
    one_for_all = bias is None or len(bias) == 1
    biases = [bias] * len(parts) if one_for_all else bias.split(MAX_WINDOWS)
    return torch.cat([sdpa(part, b, scale, padding) for part, b in zip(parts, biases)])

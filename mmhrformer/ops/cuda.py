"""Backend for GPUs, built from torch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, sdpa
from .recompute import norm_gelu_conv as norm_gelu_conv

# Limit of the grid axis to which the attention kernels map the windows.
MAX_WINDOWS = 65_535
# The fast kernels need head dims that are multiples of 8: not 18 (HRFormer-T) or 39 (-B).
HEAD_DIM_MULTIPLE = 8


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`mmhrformer.ops.pointwise_conv`.

    cuDNN adds the bias in a separate pass, cuBLAS while it writes the product: the FFNs alone of
    HRFormer-S took 19.7 ms with cuDNN and 18.2 ms with cuBLAS on an H200.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        return reference.pointwise_conv(x, weight, bias)
    rows = x.permute(0, 2, 3, 1)  # (B, H, W, C)
    return F.linear(rows, weight.flatten(1), bias).permute(0, 3, 1, 2)


def head_padding(head_dim: int) -> int:
    """Number of zeros to append to each head."""
    return -head_dim % HEAD_DIM_MULTIPLE


def window_attention(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """See :func:`mmhrformer.ops.window_attention`."""
    padding = head_padding(qkv.shape[-1])
    if len(qkv) <= MAX_WINDOWS:
        return sdpa.window_attention(qkv, bias, scale, padding)
    parts = qkv.split(MAX_WINDOWS)
    one_for_all = bias is None or len(bias) == 1
    biases = [bias] * len(parts) if one_for_all else bias.split(MAX_WINDOWS)
    options = scale, padding
    return torch.cat([sdpa.window_attention(*pair, *options) for pair in zip(parts, biases)])

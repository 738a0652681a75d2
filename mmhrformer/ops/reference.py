"""The plain forms: what the paper says, in ordinary operators, on any device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .state import is_transformed


def head_padding(head_dim: int) -> int:
    """See :func:`mmhrformer.ops.cpu.head_padding`: none."""
    return 0


def attends_on_map(*_) -> bool:
    """See :func:`mmhrformer.ops.attends_on_map`: never."""
    return False


def add_path(x: Tensor, path: Tensor, drop: nn.Module) -> Tensor:
    """See :func:`mmhrformer.ops.add_path`."""
    return x + drop(path)


def has_folded_block(*_) -> bool:
    """See :func:`mmhrformer.ops.has_folded_block`: never."""
    return False


def window_attention(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """See :func:`mmhrformer.ops.window_attention`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B * nW, heads, N, head_dim) each
    if q.dtype == torch.float16 or torch.onnx.is_in_onnx_export():
        # Products that are scaled afterwards can be too large for float16, which ONNX files may
        # be turned into.
        q, scale = q * scale, 1.0
    logits = q @ k.transpose(-2, -1)  # (B * nW, heads, N, N)
    # Scale and bias in one pass, and no scaled copies of queries or keys for the backward pass.
    logits = logits * scale if bias is None else torch.add(bias, logits, alpha=scale)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """See :func:`mmhrformer.ops.depthwise_conv`."""
    return F.conv2d(x, weight, bias, stride, padding=1, groups=x.shape[1])


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """See :func:`mmhrformer.ops.layer_norm`."""
    return norm(x)


def norm_gelu_conv(x: Tensor, norm: nn.Module, conv: nn.Module | None = None) -> Tensor:
    """See :func:`mmhrformer.ops.norm_gelu_conv`."""
    x = gelu(norm(x))
    return x if conv is None else conv(x)


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`mmhrformer.ops.pointwise_conv`."""
    return F.conv2d(x, weight, bias)


def conv_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """See :func:`mmhrformer.ops.conv_gelu`."""
    return gelu(conv._conv_forward(x, conv.weight, conv.bias))


def gelu(x: Tensor) -> Tensor:
    """Exact GELU of a map (B, C, H, W).

    On a CPU, torch 2.1's own returns wrong gradients, without a word, if the input is contiguous
    and the gradient from behind is not. Maps are channels-last in an FFN, so that nothing is
    copied here; ``torch.func`` knows no other memory formats, and gets the formula.
    """
    if is_transformed():
        return x * (1 + torch.erf(x * math.sqrt(0.5))) / 2
    return F.gelu(x.contiguous(memory_format=torch.channels_last))

"""The reference: the formulas of the paper in ordinary operators, for any device."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .state import is_transformed

# The operators that every backend has; the reference is the fallback.
__all__ = [
    'add_path',
    'attends_on_map',
    'channel_padding',
    'conv_gelu',
    'depthwise_conv',
    'exchange_sum',
    'fork_layer_norm',
    'has_conv_ffn',
    'has_folded_block',
    'head_padding',
    'norm_gelu_conv',
    'pointwise_conv',
    'window_attention',
]


def add_path(x: Tensor, path: Tensor, drop: nn.Module) -> Tensor:
    """Add a residual path, with stochastic depth.

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        path (Tensor): Residual path of the same shape.
        drop (nn.Module): Stochastic depth, or an identity.

    Returns:
        Tensor: ``x + drop(path)``.
    """
    return x + drop(path)


def window_attention(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Multi-head attention, softmax(q k^T * scale + bias) v, in a batch of windows.

    Args:
        qkv (Tensor): Queries, keys and values of shape (B * nW, N, 3, heads, head_dim).
        bias (Tensor, optional): Bias of the logits; broadcasts to (B * nW, heads, N, N).
        scale (float): Factor of the logits, applied before the bias.

    Returns:
        Tensor: Weighted sums of the values, of shape (B * nW, N, heads * head_dim).
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B * nW, heads, N, head_dim) each
    if q.dtype == torch.float16 or torch.onnx.is_in_onnx_export():
        # Scale first: unscaled logits may overflow in float16, to which ONNX files may be
        # converted.
        q, scale = q * scale, 1.0
    logits = q @ k.transpose(-2, -1)  # (B * nW, heads, N, N)
    # Scale and bias in one pass, without scaled copies of queries or keys for the backward pass.
    logits = logits * scale if bias is None else torch.add(bias, logits, alpha=scale)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """3x3 depth-wise convolution, padded with one zero on each side.

    Args:
        x (Tensor): Map of shape (B, C, H, W).
        weight (Tensor): Weight of shape (C, 1, 3, 3).
        bias (Tensor, optional): Bias of shape (C,).
        stride (int): Stride. Defaults to 1.

    Returns:
        Tensor: Map of shape (B, C, ceil(H / stride), ceil(W / stride)), in the memory format of
        the input.
    """
    return F.conv2d(x, weight, bias, stride, padding=1, groups=x.shape[1])


def fork_layer_norm(x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Compute ``norm(x)`` for a layer that casts its input to the data type of autocast.

    Args:
        x (Tensor): Tokens of shape (..., C).
        norm (nn.Module): The normalization. It is called as a module unless it is a plain
            ``nn.LayerNorm``, which a kernel may replace.

    Returns:
        tuple[Tensor, Tensor]: Normalized tokens of shape (..., C), and ``x`` for the residual
        path around what follows. Of a kernel, the gradients of both come together.
    """
    return norm(x), x


def norm_gelu_conv(x: Tensor, norm: nn.Module, conv: nn.Module | None = None) -> Tensor:
    """Compute ``conv(gelu(norm(x)))``.

    Both modules are called. If they are plain ones, intermediate results may be recomputed in the
    backward pass instead of kept.

    Args:
        x (Tensor): Map of shape (B, C, H, W).
        norm (nn.Module): The normalization.
        conv (nn.Module, optional): The convolution. Defaults to None: no convolution.

    Returns:
        Tensor: Map of shape (B, out_channels, H', W').
    """
    x = gelu(norm(x))
    return x if conv is None else conv(x)


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution of folded models.

    Args:
        x (Tensor): Map of shape (B, C, H, W).
        weight (Tensor): Weight of shape (out_channels, C, 1, 1).
        bias (Tensor, optional): Bias of shape (out_channels,).

    Returns:
        Tensor: Map of shape (B, out_channels, H, W).
    """
    return F.conv2d(x, weight, bias)


def conv_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Compute ``gelu(conv(x))`` from the weights of a convolution, for inference.

    Args:
        x (Tensor): Map of shape (B, C, H, W).
        conv (nn.Conv2d): The convolution. Its weight, bias and options are used; it is not called.

    Returns:
        Tensor: Map of shape (B, out_channels, H', W').
    """
    return gelu(conv._conv_forward(x, conv.weight, conv.bias))


def enlarge(x: Tensor, factor: int, mode: str) -> Tensor:
    """Upsample a map (B, C, H, W) by a factor, ``'nearest'`` or ``'bilinear'``."""
    align_corners = None if mode == 'nearest' else False
    return F.interpolate(x, scale_factor=factor, mode=mode, align_corners=align_corners)


def exchange_sum(
    x: Tensor, others: Iterable[tuple[Tensor, int]], mode: str, relu: nn.Module
) -> Tensor:
    """Compute ``relu(x + other + ...)``, the sum of an exchange between streams.

    Args:
        x (Tensor): Map of shape (B, C, H, W).
        others (Iterable[tuple[Tensor, int]]): Maps of shape (B, C, H / factor, W / factor), each
            with its factor, a power of two, by which it is upsampled. They are added in this order.
        mode (str): ``'nearest'`` or ``'bilinear'``.
        relu (nn.Module): The activation. It is called as a module unless it is a plain
            ``nn.ReLU``, which a kernel may replace.

    Returns:
        Tensor: Map of shape (B, C, H, W).
    """
    for other, factor in others:
        x = x + (other if factor == 1 else enlarge(other, factor, mode))
    return relu(x)


def head_padding(head_dim: int) -> int:
    """Number of zeros to append to each head for faster kernels: none."""
    return 0


def channel_padding(channels: int) -> int:
    """Number of zero channels to append to the streams of a folded backbone: none."""
    return 0


def attends_on_map(x: Tensor, qkv: nn.Module, heads: int, window: int) -> bool:
    """Whether :func:`attend_on_map` and :func:`map_attention` can be used.

    Args:
        x (Tensor): Input of the projection, of shape (B, H, W, C).
        qkv (nn.Module): The projection to queries, keys and values. Its bias must be its output
            for zero padding.
        heads (int): Attention heads.
        window (int): Side of the windows, in tokens.

    Returns:
        bool: Whether a kernel supports this input.
    """
    return False


def has_conv_ffn(x: Tensor, ffn: nn.Module) -> bool:
    """Whether :func:`conv_ffn` can compute an FFN.

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        ffn (nn.Module): A :class:`mmhrformer.models.ffn.DWConvFFN`.

    Returns:
        bool: Whether there are kernels for it.
    """
    return False


def has_folded_block(x: Tensor, block: nn.Module) -> bool:
    """Whether :func:`folded_block` can compute a folded block.

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        block (nn.Module): A :class:`mmhrformer.deploy.fuse.FusedBlock`.

    Returns:
        bool: Whether the kernels support this input.
    """
    return False


def gelu(x: Tensor) -> Tensor:
    """Exact GELU of a map (B, C, H, W).

    On a CPU, torch 2.1's GELU silently returns wrong gradients if the input is contiguous and the
    incoming gradient is not. The maps in an FFN are channels-last, so nothing is copied here.
    ``torch.func`` does not support memory formats and gets the formula.
    """
    if is_transformed():
        return x * (1 + torch.erf(x * math.sqrt(0.5))) / 2
    return F.gelu(x.contiguous(memory_format=torch.channels_last))

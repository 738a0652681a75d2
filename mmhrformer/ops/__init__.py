"""The functions of the model that have a plain form and fast forms.

The model says what is computed, this package decides how. :func:`backend` picks a form by device,
data type and what records or transforms the computation; nothing else in the package asks.

``ops.use('reference')`` forces the plain forms, and so does the environment variable
``MMHRFORMER_OPS=reference``.
"""

from __future__ import annotations

from torch import Tensor, nn

from .dispatch import backend, use
from .windows import padding_mask, window_count, window_merge, window_padding, window_partition

__all__ = [
    'backend',
    'conv_gelu',
    'depthwise_conv',
    'norm_gelu_conv',
    'padding_mask',
    'use',
    'window_attention',
    'window_count',
    'window_merge',
    'window_padding',
    'window_partition',
]


def window_attention(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Multi-head attention, softmax(q k^T * scale + bias) v, in many windows at a time.

    Args:
        qkv (Tensor): Queries, keys and values of shape (B * nW, N, 3, heads, head_dim).
        bias (Tensor, optional): What to add to the logits; broadcasts to
            (B * nW, heads, N, N).
        scale (float): What to multiply the logits with first.

    Returns:
        Tensor: Weighted sums of the values, of shape (B * nW, N, heads * head_dim).
    """
    return backend(qkv).window_attention(qkv, bias, scale)


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
    return backend(x).depthwise_conv(x, weight, bias, stride)


def norm_gelu_conv(x: Tensor, norm: nn.Module, conv: nn.Module | None = None) -> Tensor:
    """Compute ``conv(gelu(norm(x)))``.

    Both modules are called, whatever they are. Where a second call in the backward pass goes
    unnoticed, what lies between ``x`` and the result is computed again there instead of kept.

    Args:
        x (Tensor): Map of shape (B, C, H, W).
        norm (nn.Module): The normalization.
        conv (nn.Module, optional): The convolution. Defaults to None: none.

    Returns:
        Tensor: Map of shape (B, out_channels, H', W').
    """
    return backend(x).norm_gelu_conv(x, norm, conv)


def conv_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Compute ``gelu(conv(x))`` by the weights of a convolution, for inference.

    Args:
        x (Tensor): Map of shape (B, C, H, W).
        conv (nn.Conv2d): Whose weight, bias, stride, padding, dilation and groups to use.

    Returns:
        Tensor: Map of shape (B, out_channels, H', W').
    """
    return backend(x).conv_gelu(x, conv)

"""The functions of the model that have a plain form and fast forms.

The model says what is computed, this package decides how. :func:`backend` picks a form by device,
data type and what traces or transforms the computation; nothing else in the package asks.

``ops.use('reference')`` forces the plain forms, and so does the environment variable
``MMHRFORMER_OPS=reference``.
"""

from __future__ import annotations

from torch import Tensor, nn

from .dispatch import backend, use
from .windows import padding_mask, window_count, window_merge, window_padding, window_partition

__all__ = [
    'add_path',
    'attend_on_map',
    'attends_on_map',
    'backend',
    'conv_gelu',
    'depthwise_conv',
    'folded_block',
    'has_folded_block',
    'layer_norm',
    'map_attention',
    'norm_gelu_conv',
    'padding_mask',
    'pointwise_conv',
    'use',
    'window_attention',
    'window_count',
    'window_merge',
    'window_padding',
    'window_partition',
]


def add_path(x: Tensor, path: Tensor, drop: nn.Module) -> Tensor:
    """Add a residual path, with stochastic depth.

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        path (Tensor): What to add, of the same shape.
        drop (nn.Module): What drops paths, or an identity.

    Returns:
        Tensor: ``x + drop(path)``.
    """
    return backend(x).add_path(x, path, drop)


def attends_on_map(x: Tensor, qkv: nn.Module, heads: int, window: int) -> bool:
    """Whether :func:`attend_on_map` and :func:`map_attention` can be used.

    Args:
        x (Tensor): What will be projected, of shape (B, H, W, C).
        qkv (nn.Module): The projection. What it makes of padding, zeros, must be its bias.
        heads (int): Attention heads.
        window (int): Side of the windows, in tokens.

    Returns:
        bool: Whether there is a kernel for it.
    """
    return backend(x).attends_on_map(x, qkv, heads, window)


def attend_on_map(
    x: Tensor,
    qkv: nn.Module,
    proj: nn.Module,
    table: Tensor | None,
    heads: int,
    window: int,
    pad_mask: bool = False,
) -> Tensor:
    """Project a map to queries, keys and values, attend within its windows, project the result.

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        qkv (nn.Module): The projection to (B, H, W, 3 * heads * head_dim).
        proj (nn.Module): The projection of what attention returns.
        table (Tensor, optional): Relative position biases, ((2 * window - 1)**2, heads).
        heads (int): Attention heads.
        window (int): Side of the windows, in tokens.
        pad_mask (bool): Whether padded tokens are hidden. Defaults to False.

    Returns:
        Tensor: Map of shape (B, H, W, C).
    """
    return backend(x).attend_on_map(x, qkv, proj, table, heads, window, pad_mask)


def map_attention(
    qkv: Tensor,
    pad: Tensor,
    table: Tensor | None,
    heads: int,
    window: int,
    scale: float,
    pad_mask: bool = False,
) -> Tensor:
    """Window attention that reads the windows from the map: none is copied.

    Args:
        qkv (Tensor): Queries, keys and values of shape (B, H, W, 3 * heads * head_dim).
        pad (Tensor): Those of a padded token, of shape (3 * heads * head_dim,).
        table (Tensor, optional): Relative position biases, ((2 * window - 1)**2, heads).
        heads (int): Attention heads.
        window (int): Side of the windows, in tokens.
        scale (float): What to multiply the logits with first.
        pad_mask (bool): Whether padded tokens are hidden. Defaults to False.

    Returns:
        Tensor: Map of shape (B, H, W, heads * head_dim).
    """
    return backend(qkv).map_attention(qkv, pad, table, heads, window, scale, pad_mask)


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


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Compute ``norm(x)`` for a layer that brings its input to the data type of autocast.

    Args:
        x (Tensor): Tokens of shape (..., C).
        norm (nn.Module): The normalization. It is called, whatever it is, unless it is a plain
            ``nn.LayerNorm``.

    Returns:
        Tensor: Normalized tokens of shape (..., C).
    """
    return backend(x).layer_norm(x, norm)


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


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution, in folded models.

    Args:
        x (Tensor): Map of shape (B, C, H, W).
        weight (Tensor): Weight of shape (out_channels, C, 1, 1).
        bias (Tensor, optional): Bias of shape (out_channels,).

    Returns:
        Tensor: Map of shape (B, out_channels, H, W).
    """
    return backend(x).pointwise_conv(x, weight, bias)


def conv_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Compute ``gelu(conv(x))`` by the weights of a convolution, for inference.

    Args:
        x (Tensor): Map of shape (B, C, H, W).
        conv (nn.Conv2d): Whose weight, bias, stride, padding, dilation and groups to use.

    Returns:
        Tensor: Map of shape (B, out_channels, H', W').
    """
    return backend(x).conv_gelu(x, conv)


def has_folded_block(x: Tensor, block: nn.Module) -> bool:
    """Whether :func:`folded_block` can compute a folded block.

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        block (nn.Module): A :class:`mmhrformer.deploy.fuse.FusedBlock`.

    Returns:
        bool: Whether there are kernels for it.
    """
    return backend(x).has_folded_block(x, block)


def folded_block(x: Tensor, block: nn.Module) -> Tensor:
    """Compute a folded block, by the weights of its parts, in few kernels.

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        block (nn.Module): A :class:`mmhrformer.deploy.fuse.FusedBlock`.

    Returns:
        Tensor: Map of the same shape.
    """
    return backend(x).folded_block(x, block)

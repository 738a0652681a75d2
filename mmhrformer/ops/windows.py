"""Partition of maps into square windows, and the inverse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_count(size: int, window: int) -> int:
    """Number of windows along an axis."""
    # Not -(-size // window): ONNX rounds quotients of negative numbers toward zero.
    return (size + window - 1) // window


def window_padding(size: int, window: int) -> tuple[int, int]:
    """Zeros to add before and after an axis to reach whole windows; an odd one goes last."""
    missing = window_count(size, window) * window - size
    return missing // 2, missing - missing // 2


def is_static(*sizes: int) -> bool:
    """Whether sizes are plain integers, not symbols of a trace with dynamic sizes.

    In ``torch.jit.trace`` and ``torch.export`` a decision based on the image size would be baked
    into the graph, so steps that only some sizes need are always traced.
    """
    return all(type(size) is int for size in sizes)


def window_partition(x: Tensor, window: int, pad_value: Tensor | None = None) -> Tensor:
    """Split a map into windows, after centered padding.

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        window (int): Side of the square windows, in tokens.
        pad_value (Tensor, optional): Padding value of shape (C,). Defaults to None: zeros.

    Returns:
        Tensor: Windows in row-major order, tokens in row-major order within each, of shape
        (B * rows * cols, window * window, C), where rows = ceil(H / window).
    """
    B, H, W, C = x.shape
    top, bottom = window_padding(H, window)
    left, right = window_padding(W, window)
    if not is_static(H, W) or bottom or right:  # never more padding before than after
        if pad_value is None:
            x = F.pad(x, (0, 0, left, right, top, bottom))
        else:
            inside = x
            # Under vmap over images, writing in place needs a batched tensor: the sum is one.
            value = inside.new_zeros(B, 1, 1, C) + pad_value
            x = value.expand(B, top + H + bottom, left + W + right, C).clone()
            x[:, top : top + H, left : left + W] = inside
    rows, cols = window_count(H, window), window_count(W, window)
    x = x.reshape(B, rows, window, cols, window, C).transpose(2, 3)  # (B, rows, cols, w, w, C)
    return x.reshape(B * rows * cols, window * window, C)


def window_merge(windows: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """Merge windows into a map without padding, the inverse of :func:`window_partition`.

    Args:
        windows (Tensor): Windows of shape (B * rows * cols, window * window, C).
        window (int): Side of the square windows, in tokens.
        size (tuple[int, int]): Height H and width W of the map without padding.

    Returns:
        Tensor: Map of shape (B, H, W, C).
    """
    H, W = size
    rows, cols = window_count(H, window), window_count(W, window)
    x = windows.reshape(-1, rows, cols, window, window, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(-1, rows * window, cols * window, windows.shape[-1])
    top, _ = window_padding(H, window)
    left, _ = window_padding(W, window)
    return x[:, top : top + H, left : left + W]


def padding_mask(size: tuple[int, int], window: int, device: torch.device) -> Tensor:
    """Mask of the padded tokens in each window.

    Args:
        size (tuple[int, int]): Height H and width W of the map without padding.
        window (int): Side of the square windows, in tokens.
        device (torch.device): Device of the mask.

    Returns:
        Tensor: Booleans of shape (rows * cols, window * window), True for padding.
    """
    real = torch.ones(1, *size, 1, device=device)
    return window_partition(real, window).flatten(1) == 0


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each (query, key) pair of a window, as in Swin Transformer.

    Args:
        window (int): Side of the square windows, in tokens.

    Returns:
        Tensor: int64 indices of shape (window**2, window**2) into (2 * window - 1)**2 offsets.
    """
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing='ij')
    y, x = y.flatten(), x.flatten()
    dy = y[:, None] - y[None, :] + window - 1
    dx = x[:, None] - x[None, :] + window - 1
    return dy * (2 * window - 1) + dx

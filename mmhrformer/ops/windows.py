"""Maps cut into square windows, and put together again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_count(size: int, window: int) -> int:
    """Windows that an axis needs."""
    # Not -(-size // window): ONNX rounds quotients of negative numbers towards zero.
    return (size + window - 1) // window


def window_padding(size: int, window: int) -> tuple[int, int]:
    """Zeros to add before and after an axis so that windows divide it; the odd one goes last."""
    missing = window_count(size, window) * window - size
    return missing // 2, missing - missing // 2


def is_static(*sizes: int) -> bool:
    """Whether sizes are plain numbers, which they are not while any size is traced at once.

    In ``torch.jit.trace`` and ``torch.export`` a decision by the size of the image would hold for
    all others, too, so steps that only some sizes need are traced in any case.
    """
    return all(type(size) is int for size in sizes)


def window_partition(x: Tensor, window: int, pad_value: Tensor | None = None) -> Tensor:
    """Cut a map into windows, after padding it on all sides alike.

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        window (int): Side of the square windows, in tokens.
        pad_value (Tensor, optional): What to pad with, of shape (C,). Defaults to None: zeros.

    Returns:
        Tensor: Windows in row-major order, tokens in row-major order within each, of shape
        (B * rows * cols, window * window, C), where rows = ceil(H / window).
    """
    B, H, W, C = x.shape
    top, bottom = window_padding(H, window)
    left, right = window_padding(W, window)
    if not is_static(H, W) or bottom or right:  # there is never more before than after
        if pad_value is None:
            x = F.pad(x, (0, 0, left, right, top, bottom))
        else:
            inside = x
            # vmap over images writes into tensors that have its batch only, which the sum gives.
            value = inside.new_zeros(B, 1, 1, C) + pad_value
            x = value.expand(B, top + H + bottom, left + W + right, C).clone()
            x[:, top : top + H, left : left + W] = inside
    rows, cols = window_count(H, window), window_count(W, window)
    x = x.reshape(B, rows, window, cols, window, C).transpose(2, 3)  # (B, rows, cols, w, w, C)
    return x.reshape(B * rows * cols, window * window, C)


def window_merge(windows: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """Put windows together again and cut the padding off: undoes :func:`window_partition`.

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
    """Which tokens of which window are padding.

    Args:
        size (tuple[int, int]): Height H and width W of the map without padding.
        window (int): Side of the square windows, in tokens.
        device (torch.device): Where to make the mask.

    Returns:
        Tensor: Booleans of shape (rows * cols, window * window), True where padded.
    """
    real = torch.ones(1, *size, 1, device=device)
    return window_partition(real, window).flatten(1) == 0


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for every (query, key) pair of a window, as in Swin Transformer.

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

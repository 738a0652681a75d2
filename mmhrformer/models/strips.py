"""Inference on large maps, piece by piece, so that what is in work stays in the CPU's cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .recompute import is_compiling

# Numbers that a piece's largest map may have: 16 MB of float32, half of a common cache.
PIECE_SIZE = 2**22


@contextmanager
def in_one_piece() -> Iterator[None]:
    """Split nothing, for those who count what is computed: strips overlap."""
    global PIECE_SIZE
    before, PIECE_SIZE = PIECE_SIZE, sys.maxsize
    try:
        yield
    finally:
        PIECE_SIZE = before


def may_split(x: Tensor) -> bool:
    """Whether pieces can be faster than the whole: inference on a CPU that nobody records."""
    recorded = is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled()
    return x.device.type == 'cpu' and not recorded


def map_strips(function: Callable[[Tensor], Tensor], x: Tensor, hidden: int) -> Tensor:
    """Apply a function that looks one row up and down to an image's rows, strip by strip.

    Args:
        function (Callable): From a map (B, H, W, C) to one of the same shape; each row may depend
            on itself and the two rows next to it, and must take what is outside for nothing.
        x (Tensor): Map of shape (B, H, W, C).
        hidden (int): Channels of the largest map in between.

    Returns:
        Tensor: ``function(x)``.
    """
    B, H, W, _ = x.shape
    if B * H * W * hidden <= PIECE_SIZE:
        return function(x)
    rows = max(1, PIECE_SIZE // (W * hidden))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for image, result in zip(x.split(1), out.split(1)):
        for top in range(0, H, rows):
            bottom = min(top + rows, H)
            first, last = max(top - 1, 0), min(bottom + 1, H)
            strip = function(image[:, first:last])
            result[:, top:bottom] = strip[:, top - first : bottom - first]
    return out


def map_windows(function: Callable[[Tensor], Tensor], windows: Tensor, hidden: int) -> Tensor:
    """Apply a function that treats windows one by one to some of them at a time.

    Args:
        function (Callable): From windows (B * nW, N, C) to windows of the same shape.
        windows (Tensor): Windows of shape (B * nW, N, C).
        hidden (int): Numbers that a window has in the largest map in between.

    Returns:
        Tensor: ``function(windows)``.
    """
    if len(windows) * hidden <= PIECE_SIZE:
        return function(windows)
    out = torch.empty_like(windows)
    count = max(1, PIECE_SIZE // hidden)
    for part, result in zip(windows.split(count), out.split(count)):
        result.copy_(function(part))
    return out

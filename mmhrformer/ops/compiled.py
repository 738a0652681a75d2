"""What compilers get: the plain forms, which they merge, and attention as one operator."""

from __future__ import annotations

from .reference import (
    add_path,
    attends_on_map,
    conv_gelu,
    depthwise_conv,
    has_folded_block,
    head_padding,
    norm_gelu_conv,
)
from .sdpa import sdpa as window_attention

__all__ = [
    'add_path',
    'attends_on_map',
    'conv_gelu',
    'depthwise_conv',
    'has_folded_block',
    'head_padding',
    'norm_gelu_conv',
    'window_attention',
]

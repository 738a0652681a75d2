"""What compilers get: the plain forms, which they merge, and attention as one operator."""

from __future__ import annotations

from .reference import (
    attends_on_map,
    conv_gelu,
    depthwise_conv,
    head_padding,
    layer_norm,
    norm_gelu_conv,
)
from .sdpa import sdpa as window_attention

__all__ = [
    'attends_on_map',
    'conv_gelu',
    'depthwise_conv',
    'head_padding',
    'layer_norm',
    'norm_gelu_conv',
    'window_attention',
]

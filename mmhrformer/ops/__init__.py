"""Operators of the model that have a reference implementation and faster ones.

The model says what is computed, this package decides how: :func:`backend` picks the implementation
by device, data type, and whether the computation is traced or transformed. Nothing else in the
package makes such decisions.

``ops.use('reference')`` forces the reference, and so does the environment variable
``MMHRFORMER_OPS=reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from torch import Tensor

from . import kernels, reference
from .dispatch import backend, use
from .reference import enlarge
from .windows import padding_mask, window_count, window_merge, window_padding, window_partition

__all__ = [
    'add_path',
    'attend_on_map',
    'attends_on_map',
    'backend',
    'conv_ffn',
    'conv_gelu',
    'depthwise_conv',
    'enlarge',
    'exchange_sum',
    'folded_block',
    'fork_layer_norm',
    'has_conv_ffn',
    'has_folded_block',
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


def dispatched(function: Callable) -> Callable:
    """Wrap an operator so that it runs on the backend that :func:`backend` picks for its input."""

    @wraps(function)
    def run(x: Tensor, *args, **kwargs):
        return getattr(backend(x), function.__name__)(x, *args, **kwargs)

    return run


add_path = dispatched(reference.add_path)
conv_gelu = dispatched(reference.conv_gelu)
depthwise_conv = dispatched(reference.depthwise_conv)
exchange_sum = dispatched(reference.exchange_sum)
fork_layer_norm = dispatched(reference.fork_layer_norm)
norm_gelu_conv = dispatched(reference.norm_gelu_conv)
pointwise_conv = dispatched(reference.pointwise_conv)
window_attention = dispatched(reference.window_attention)
# attends_* and has_* return whether the kernels without a reference implementation apply.
attends_on_map = dispatched(reference.attends_on_map)
attend_on_map = dispatched(kernels.attend_on_map)
map_attention = dispatched(kernels.map_attention)
has_conv_ffn = dispatched(reference.has_conv_ffn)
conv_ffn = dispatched(kernels.conv_ffn)
has_folded_block = dispatched(reference.has_folded_block)
folded_block = dispatched(kernels.folded_block)

"""Validation of arguments: each error names the argument, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor

from ..ops.state import autocast_converts

NUM_STREAMS = 4
MIN_INPUT = 32  # pixels per side, for one token in the coarsest stream


def is_integer(value: Any, low: int, high: float = math.inf) -> bool:
    """Whether a value is an integer between two bounds, inclusive."""
    return isinstance(value, Integral) and low <= value <= high


def are_positive_ints(values: Any) -> bool:
    """Whether a value is a non-empty list of positive integers."""
    is_list = isinstance(values, Sequence) and len(values) > 0
    return is_list and all(is_integer(value, 1) for value in values)


def as_indices(value: Any) -> tuple:
    """One index, or a list, tuple, range, array or tensor of them, as a tuple."""
    value = value.tolist() if hasattr(value, 'tolist') else value  # of NumPy and torch
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (value,)
    return tuple(int(index) if isinstance(index, Integral) else index for index in value)


def check_positive_int(name: str, value: Any) -> None:
    """Refuse anything but a positive integer."""
    if not is_integer(value, 1):
        raise ValueError(f'{name}={value!r}: expected a positive integer')


def check_probability(name: str, value: Any) -> None:
    """Refuse anything but a number in [0, 1)."""
    if not (isinstance(value, Real) and 0 <= value < 1):
        raise ValueError(f'{name}={value!r}: expected a number in [0, 1)')


def check_flags(**flags: Any) -> None:
    """Refuse anything but True and False: text such as ``'no'`` would count as true."""
    for name, value in flags.items():
        if value not in (True, False):
            raise ValueError(f'{name}={value!r}: expected True or False')


def check_norm_cfg(norm_cfg: dict, channels: Iterable[int]) -> None:
    """Refuse a normalization that does not work on the maps of a model.

    Args:
        norm_cfg (dict): Config of the normalization.
        channels (Iterable[int]): Channels of the maps (B, C, H, W).

    Raises:
        ValueError: If it is not a config, or its layer does not work on such maps.
    """
    if not isinstance(norm_cfg, Mapping) or 'type' not in norm_cfg:
        raise ValueError(
            f'norm_cfg={norm_cfg!r}: expected the config of a normalization, such as '
            "dict(type='BN')"
        )
    for count in sorted(set(channels)):
        try:
            layer = build_norm_layer(dict(norm_cfg), count)[1].eval()
            layer(torch.zeros(1, count, 2, 3))
        except Exception as err:
            # mmcv's assertion that GN has num_groups has no message.
            reason = str(err) or 'an option is missing, such as num_groups'
            raise ValueError(
                f'norm_cfg={dict(norm_cfg)!r} cannot normalize maps of shape (B, {count}, H, W): '
                f"{reason}. Use dict(type='BN'), dict(type='SyncBN'), "
                "dict(type='GN', num_groups=...) with a number that divides all channels, "
                f"{sorted(set(channels))}, or a framework's layer by its full name, such as "
                'mmpretrain.LN2d'
            ) from err


# The backbone


def complete_arch(arch: Mapping) -> dict:
    """Complete and validate an architecture, see :func:`~.hrformer.parse_arch`."""
    lengths = dict(channels=NUM_STREAMS, num_heads=NUM_STREAMS, num_modules=NUM_STREAMS - 1)
    fields = {'num_blocks': 2, 'mlp_ratio': 4, **arch}
    names = {*lengths, 'num_blocks', 'mlp_ratio'}
    if set(fields) != names:
        raise ValueError(
            f'arch={dict(arch)!r}: unknown fields {sorted(set(fields) - names)}, missing fields '
            f'{sorted(names - set(fields))}; expected the fields {sorted(names)}'
        )
    for name, length in lengths.items():
        value = fields[name]
        if not are_positive_ints(value) or len(value) != length:
            raise ValueError(f'arch[{name!r}]={value!r}: expected {length} positive integers')
        fields[name] = tuple(value)
    check_positive_int("arch['num_blocks']", fields['num_blocks'])
    ratio, channels, heads = fields['mlp_ratio'], fields['channels'], fields['num_heads']
    # The narrowest stream needs at least one hidden channel.
    if not (isinstance(ratio, Real) and 1 <= ratio * min(channels) < math.inf):
        raise ValueError(f"arch['mlp_ratio']={ratio!r}: expected a positive number, such as 4")
    for width, count in zip(channels, heads):
        if width % count:
            raise ValueError(
                f"arch['num_heads']={heads} does not divide arch['channels']={channels}: {width} "
                f'channels cannot be split into {count} heads'
            )
    return fields


def window_per_stream(window_size: int | Sequence[int]) -> tuple[int, ...]:
    """Side of the windows for each stream."""
    sizes = window_size if isinstance(window_size, Sequence) else (window_size,) * NUM_STREAMS
    if not are_positive_ints(sizes) or len(sizes) != NUM_STREAMS:
        raise ValueError(
            f'window_size={window_size!r}: expected a positive integer, or one for each of the '
            f'{NUM_STREAMS} streams'
        )
    return tuple(sizes)


def stream_indices(out_indices: Any) -> tuple[int, ...]:
    """Indices of streams as non-negative integers."""
    streams = range(NUM_STREAMS)
    indices = tuple(
        index + NUM_STREAMS if is_integer(index, -NUM_STREAMS, -1) else index
        for index in as_indices(out_indices)
    )
    known = all(is_integer(index, 0, NUM_STREAMS - 1) for index in indices)
    if not indices or not known or len(set(indices)) < len(indices):
        raise ValueError(f'out_indices={indices}: expected distinct streams of {tuple(streams)}')
    return indices


def check_backbone(
    in_channels: int, drop_path_rate: float, upsample: str, frozen_stages: int
) -> None:
    """Refuse invalid options of :class:`HRFormer`."""
    check_positive_int('in_channels', in_channels)
    check_probability('drop_path_rate', drop_path_rate)
    if upsample not in ('nearest', 'bilinear'):
        raise ValueError(f"upsample={upsample!r}: expected 'nearest' or 'bilinear'")
    if not is_integer(frozen_stages, -1, NUM_STREAMS):
        raise ValueError(
            f'frozen_stages={frozen_stages!r}: expected an integer from -1 to {NUM_STREAMS}'
        )


def check_images(x: Tensor, in_channels: int, weights: Iterable[Tensor]) -> None:
    """Refuse an input that is not a batch of images, or does not match the first weight's type."""
    expected = f'(B, {in_channels}, H, W)'
    if not isinstance(x, Tensor):
        raise TypeError(
            f'HRFormer got {type(x).__name__} as input: expected a tensor of images, {expected}'
        )
    for weight in weights:  # replicas of DataParallel have no parameters
        dtype = weight.dtype
        if x.dtype != dtype and not autocast_converts(x):
            raise TypeError(
                f'HRFormer got an input of {x.dtype}, but its weights are {dtype}: normalize the '
                f'images, as the data_preprocessor of a model does, and call .to({dtype})'
            )
        break
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(
            f'HRFormer got an input of shape {tuple(x.shape)}: expected images of shape '
            f'{expected}; for other channels, set in_channels'
        )
    if x.shape[2] < MIN_INPUT or x.shape[3] < MIN_INPUT:
        raise ValueError(
            f'HRFormer got images of {x.shape[2]}x{x.shape[3]} pixels: resize or pad them to at '
            f'least {MIN_INPUT}x{MIN_INPUT}'
        )


# Its blocks


def complete_cfg(name: str, cfg: dict, **options) -> dict:
    """Add the options that the block sets to the config of one of its parts."""
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise ValueError(f"{name}={cfg!r}: expected a config, dict(type='mmhrformer.NAME', ...)")
    if twice := sorted(set(cfg) & set(options)):
        raise ValueError(
            f'{name}={cfg!r}: {", ".join(twice)} cannot be set here; remove it and set the '
            'argument of the block or of HRFormer instead'
        )
    return {**options, **cfg}


def hidden_channels(embed_dims: int, mlp_ratio: float) -> int:
    """Number of hidden channels of an FFN, at least one."""
    if int(mlp_ratio * embed_dims) < 1:
        raise ValueError(
            f'mlp_ratio={mlp_ratio} gives no hidden channels with embed_dims={embed_dims}: use a '
            'larger number, such as 4'
        )
    return int(mlp_ratio * embed_dims)


def check_attention(embed_dims: int, num_heads: int, window_size: int) -> None:
    """Refuse heads that do not divide the channels, and empty windows."""
    if num_heads < 1 or embed_dims % num_heads:
        raise ValueError(
            f'num_heads={num_heads} does not divide embed_dims={embed_dims}: '
            'choose a number of heads that divides the channels of its stream'
        )
    if window_size < 1:
        raise ValueError(f'window_size={window_size}: expected a positive integer')


# The neck


def check_neck(in_channels: Sequence[int], mid_channels: Sequence[int], out_channels: int) -> None:
    """Refuse channels of :class:`HRFormerFusion` that are invalid or differ in length."""
    for name, value in dict(in_channels=in_channels, mid_channels=mid_channels).items():
        if not are_positive_ints(value):
            raise ValueError(f'{name}={value!r}: expected positive integers, one per stream')
    check_positive_int('out_channels', out_channels)
    if len(in_channels) != len(mid_channels):
        raise ValueError(
            f'in_channels={tuple(in_channels)} and mid_channels={tuple(mid_channels)} must have '
            'the same length, one number per stream'
        )

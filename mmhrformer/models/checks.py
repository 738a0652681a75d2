"""Checks of arguments that several models have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from mmcv.cnn import build_norm_layer


def check_norm_cfg(norm_cfg: dict, channels: Iterable[int]) -> None:
    """Refuse a normalization that does not fit the maps of a model, before it meets one.

    Args:
        norm_cfg (dict): Config of the normalization.
        channels (Iterable[int]): Channels of the maps (B, C, H, W).

    Raises:
        ValueError: If it is no config, or not one of a normalization for such maps.
    """
    if not isinstance(norm_cfg, Mapping) or 'type' not in norm_cfg:
        raise ValueError(
            f"norm_cfg={norm_cfg!r}: give the config of a normalization, such as dict(type='BN')"
        )
    for count in sorted(set(channels)):
        try:
            layer = build_norm_layer(dict(norm_cfg), count)[1].eval()
            layer(torch.zeros(1, count, 2, 3))
        except Exception as err:
            # mmcv asserts without a word that GN has num_groups.
            reason = str(err) or 'an option is missing, such as num_groups'
            raise ValueError(
                f'norm_cfg={dict(norm_cfg)!r} gives no normalization of maps (B, {count}, H, W): '
                f"{reason}. Give one, such as dict(type='BN'), dict(type='SyncBN'), "
                "dict(type='GN', num_groups=...) with a number that divides all channels, "
                f'{sorted(set(channels))}, or one of a framework by its full name, such as '
                'mmpretrain.LN2d'
            ) from err


def as_indices(value: Any) -> tuple:
    """Bring one index, or a list, tuple, range, array or tensor of them, to a tuple."""
    value = value.tolist() if hasattr(value, 'tolist') else value  # of NumPy and torch
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (value,)
    return tuple(int(index) if isinstance(index, Integral) else index for index in value)

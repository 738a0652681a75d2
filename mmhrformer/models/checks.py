"""Checks of arguments that several parts of the model take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mmcv.cnn import build_norm_layer


def check_norm_cfg(norm_cfg: dict, channels: Iterable[int]) -> None:
    """Check that a normalization can be built for every number of channels that it is for.

    Args:
        norm_cfg (dict): Config of the normalization.
        channels (Iterable[int]): The numbers of channels.

    Raises:
        ValueError: If it is no config, or cannot be built.
    """
    if not isinstance(norm_cfg, Mapping) or 'type' not in norm_cfg:
        raise ValueError(
            f"norm_cfg={norm_cfg!r}: give the config of a normalization, such as dict(type='BN')"
        )
    for number in sorted(set(channels)):
        try:
            build_norm_layer(norm_cfg, number)
        except Exception as err:
            # mmcv asserts without a word that GN has num_groups
            reason = str(err) or 'an option is missing, such as num_groups'
            raise ValueError(
                f'norm_cfg={norm_cfg!r} is not possible for {number} channels: {reason}. Give a '
                f'normalization that fits {sorted(set(channels))} channels, such as '
                "dict(type='BN'), or dict(type='GN', num_groups=...) with a common divisor"
            ) from err

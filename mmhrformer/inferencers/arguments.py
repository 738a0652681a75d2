"""Checks of what inferencers are given; each error names the argument, the value and the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from mmengine.device import get_device

from ..utils.suggest import did_you_mean

DTYPES = {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def check_device(device: str | None) -> torch.device:
    """Return a device that exists here, the best one for None."""
    try:
        found = torch.device(device or get_device())
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError, TypeError) as err:
        reason = str(err).splitlines()[0]
        raise ValueError(
            f"device={device!r}: {reason}. Give a device that this machine has, such as 'cpu'"
        ) from err
    return found


def check_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """Return what autocast has to use, None for float32; refuse what the device cannot."""
    if dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r}: choose one of {list(DTYPES)}')
    if DTYPES[dtype] is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error')  # where torch would go on in float32
            with torch.autocast(device.type, DTYPES[dtype]):
                pass
    except (RuntimeError, UserWarning) as err:
        others = [name for name in DTYPES if name != dtype]
        reason = ' '.join(str(err).split())
        raise ValueError(
            f'dtype={dtype!r}: torch {torch.__version__} cannot on device={str(device)!r} '
            f'({reason}). Choose one of {others}'
        ) from err
    return DTYPES[dtype]


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f'{name}={value!r}: give a whole number of at least {least}')


def check_draw_options(given: Mapping, known: set[str]) -> None:
    """Refuse options that the stock inferencer does not draw with."""
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f'{unknown[0]}={given[unknown[0]]!r}: no such argument. Options of drawing for this '
            f'task are {sorted(known)}. {did_you_mean(unknown[0], known)}'.rstrip()
        )


def check_box_array(boxes: object, name: str) -> np.ndarray:
    """Return boxes as (N, 4) float32; refuse others."""
    wanted = 'give (N, 4) numbers: left, top, right, bottom in pixels for each person'
    try:
        array = np.asarray(boxes, np.float32)
    except (TypeError, ValueError) as err:
        raise ValueError(f'{name}={boxes!r}: {wanted}') from err
    if array.size == 0:
        return array.reshape(0, 4)  # an image without people
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f'{name}: an array of shape {array.shape}; {wanted}')
    flat = ~((array[:, 2] > array[:, 0]) & (array[:, 3] > array[:, 1]) & np.isfinite(array).all(1))
    if flat.any():
        i = int(flat.argmax())
        raise ValueError(
            f'{name}[{i}]={array[i].tolist()}: a box without area; {wanted} (not width and height)'
        )
    return array

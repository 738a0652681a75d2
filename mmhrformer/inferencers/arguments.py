"""Validation of inferencer arguments; errors name the argument, the value and the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device

from ..checkpoints import read_zoo
from ..configs import name_of
from ..datasets.meta import augmented_tests
from ..utils.suggest import did_you_mean

DTYPES = {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
TASKS = {'mmpretrain': 'cls', 'mmpose': 'pose', 'mmseg': 'seg'}  # by default_scope


def task_of(cfg: Config) -> str:
    """Return the task of a config: ``'cls'``, ``'pose'`` or ``'seg'``."""
    scope = cfg.get('default_scope')
    if scope not in TASKS:
        raise ValueError(
            f'model={cfg.filename!r}: its default_scope is {scope!r}; expected a config of one of '
            f'{list(TASKS)}'
        )
    return TASKS[scope]


def refuse_tta(cfg: Config) -> None:
    """Refuse a config with test-time augmentation."""
    if kind := augmented_tests(cfg):
        raise ValueError(
            f'model={cfg.filename!r} has {kind}: inferencers do not support test-time '
            'augmentation. Use the config that the model was trained with, or evaluate with '
            'python -m mmhrformer test CONFIG CHECKPOINT --tta'
        )


def check_checkpoint(cfg: Config, checkpoint: bool | str | Path) -> None:
    """Refuse an empty checkpoint, and True for models without published weights."""
    if not checkpoint and checkpoint is not False:
        raise ValueError(
            f'checkpoint={checkpoint!r}: expected the path of a file, True for the published '
            'weights, or False for random ones'
        )
    if checkpoint is True and name_of(cfg) not in read_zoo():
        raise ValueError(
            f'checkpoint=True: {cfg.filename!r} is not a model of the zoo, so there are no '
            'published weights; pass the path of your checkpoint'
        )


def check_device(device: str | None) -> torch.device:
    """Return a device that is available, the best one for None."""
    try:
        found = torch.device(device or get_device())
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError, TypeError) as err:
        reason = str(err).splitlines()[0]
        raise ValueError(
            f"device={device!r}: {reason}. Choose an available device, such as 'cpu'"
        ) from err
    return found


def check_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """Return the data type for autocast, None for float32; refuse unsupported ones."""
    if dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r}: choose one of {list(DTYPES)}')
    if DTYPES[dtype] is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error')  # torch would silently use float32
            with torch.autocast(device.type, DTYPES[dtype]):
                pass
    except (RuntimeError, UserWarning) as err:
        others = [name for name in DTYPES if name != dtype]
        reason = ' '.join(str(err).split())
        raise ValueError(
            f'dtype={dtype!r}: torch {torch.__version__} does not support it on '
            f'device={str(device)!r} ({reason}). Choose one of {others}'
        ) from err
    return DTYPES[dtype]


def check_exported(device: str | None, dtype: str, fuse: bool) -> str:
    """Return the device of exported files; refuse unsupported options."""
    given = dict(device=str(device or 'cpu'), dtype=dtype, fuse=fuse)
    for name, value in dict(device='cpu', dtype='float32', fuse=False).items():
        if given[name] != value:
            raise ValueError(
                f'{name}={given[name]!r}: an exported file is already folded, and runs on the CPU '
                f'in float32; remove {name}, or use the checkpoint that it was exported from'
            )
    return 'cpu'


def check_batch_size(value: object) -> None:
    """Refuse anything but positive integers."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f'batch_size={value!r}: expected a positive integer')


def check_draw_options(given: Mapping, known: Sequence[str]) -> None:
    """Refuse drawing options that the task does not have."""
    for name in set(given) - set(known):
        raise ValueError(
            f'{name}={given[name]!r}: no such argument. Drawing options of this task are '
            f'{list(known)}. {did_you_mean(name, known)}'.rstrip()
        )

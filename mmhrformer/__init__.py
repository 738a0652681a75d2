"""HRFormer for mmpretrain, mmpose and mmsegmentation: one backbone, three tasks."""

from __future__ import annotations

from . import datasets, engine, models
from .checkpoints import load_checkpoint
from .models import *  # noqa: F403
from .models import __all__ as _models
from .registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS
from .version import __version__

__all__ = [
    'MODELS',
    'PARAM_SCHEDULERS',
    'TRANSFORMS',
    '__version__',
    'datasets',
    'engine',
    'load_checkpoint',
    'models',
]
__all__ += _models


def __getattr__(name: str) -> type:
    return getattr(models, name)

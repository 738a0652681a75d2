"""HRFormer for mmpretrain, mmpose and mmsegmentation: one backbone, three tasks."""

from __future__ import annotations

from . import datasets, engine, models
from .apis import fuse_for_inference, get_model, list_models, register_in_mmpretrain
from .checkpoints import load_checkpoint
from .models import *  # noqa: F403
from .models import __all__ as _models
from .registry import (
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    VISBACKENDS,
)
from .version import __version__

__all__ = [
    'MODELS',
    'OPTIM_WRAPPER_CONSTRUCTORS',
    'PARAM_SCHEDULERS',
    'TRANSFORMS',
    'VISBACKENDS',
    '__version__',
    'datasets',
    'engine',
    'fuse_for_inference',
    'get_model',
    'list_models',
    'load_checkpoint',
    'models',
    'register_in_mmpretrain',
]
__all__ += _models


def __getattr__(name: str) -> type:
    return getattr(models, name)

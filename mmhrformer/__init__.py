"""HRFormer for mmpretrain, mmpose and mmsegmentation: one backbone, three tasks."""

from __future__ import annotations

# ruff: noqa: E402
from .environment import check_core

check_core()  # before what needs it, so that the error tells how to mend an installation

from . import datasets, engine, models
from .apis import (
    ClsInferencer,
    PoseInferencer,
    SegInferencer,
    compile_blocks,
    fuse_for_inference,
    get_inferencer,
    get_model,
    inference,
    list_models,
    register_in_mmpretrain,
)
from .checkpoints import load_checkpoint
from .engine.cpu_dist import prepare_cpu_launch
from .models import *  # noqa: F403
from .models import __all__ as _models
from .registry import (
    HOOKS,
    MODEL_WRAPPERS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    VISBACKENDS,
)
from .version import __version__

__all__ = [
    'HOOKS',
    'MODELS',
    'MODEL_WRAPPERS',
    'OPTIM_WRAPPER_CONSTRUCTORS',
    'PARAM_SCHEDULERS',
    'TRANSFORMS',
    'VISBACKENDS',
    'ClsInferencer',
    'PoseInferencer',
    'SegInferencer',
    '__version__',
    'compile_blocks',
    'datasets',
    'engine',
    'fuse_for_inference',
    'get_inferencer',
    'get_model',
    'inference',
    'list_models',
    'load_checkpoint',
    'models',
    'register_in_mmpretrain',
]
__all__ += _models

# Configs import this package before mmengine starts its process group, and nothing else of ours
# runs that early. Nothing happens here unless this process was started by a launcher, with
# `--launcher pytorch`, on a machine without an accelerator: mmengine would ask for a CUDA device.
prepare_cpu_launch()


def __getattr__(name: str) -> type:
    return getattr(models, name)

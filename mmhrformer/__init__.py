"""HRFormer for mmpretrain, mmpose and mmsegmentation: one backbone, three tasks.

Importing the package registers its classes, the scheme ``mmhrformer://`` and a file backend with
mmengine, and allows ``torch.load`` to read the contents of mmengine's checkpoints
(:mod:`mmhrformer.engine.safe_globals`). It has no other effects.
"""

from __future__ import annotations

# ruff: noqa: E402
from .utils.install_hints import check_core

check_core()  # before the other imports, so that the error says how to fix the installation

from . import datasets, engine, models
from .apis import (
    ClsInferencer,
    PoseInferencer,
    SegInferencer,
    compile_blocks,
    fuse_for_inference,
    get_inferencer,
    get_model,
    graph_backbone,
    inference,
    list_models,
    register_in_mmpretrain,
)
from .checkpoints import load_checkpoint
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
    'graph_backbone',
    'inference',
    'list_models',
    'load_checkpoint',
    'models',
    'register_in_mmpretrain',
]
__all__ += _models


def __getattr__(name: str) -> type:
    return getattr(models, name)

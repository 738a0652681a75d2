"""The public API: models by name, inference, and optimized versions of a model."""

from __future__ import annotations

from .deploy.compile import compile_blocks
from .deploy.fuse import fuse_for_inference
from .engine.cuda_graph_hook import graph_backbone
from .hub import get_model, list_models, register_in_mmpretrain
from .inferencers import (
    ClsInferencer,
    Inferencer,
    PoseInferencer,
    SegInferencer,
    get_inferencer,
    inference,
)

__all__ = [
    'ClsInferencer',
    'Inferencer',
    'PoseInferencer',
    'SegInferencer',
    'compile_blocks',
    'fuse_for_inference',
    'get_inferencer',
    'get_model',
    'graph_backbone',
    'inference',
    'list_models',
    'register_in_mmpretrain',
]

"""Hooks, optimizers, schedules and checks for training; importing this registers them."""

from .bfloat16_hook import BFloat16PoseHook
from .checkpoint_hook import SafeCheckpointHook
from .compile_hook import CompileBlocksHook
from .config_check import ConfigCheckVisBackend
from .cpu_ddp import CPUDistributedDataParallel
from .cuda_graph_hook import CUDAGraphHook
from .optim import DecayGroupsConstructor
from .safe_globals import allow_mmengine_checkpoints
from .schedulers import WarmupCosineLR
from .seed_hook import ResumableSeedHook

__all__ = [
    'BFloat16PoseHook',
    'CPUDistributedDataParallel',
    'CUDAGraphHook',
    'CompileBlocksHook',
    'ConfigCheckVisBackend',
    'DecayGroupsConstructor',
    'ResumableSeedHook',
    'SafeCheckpointHook',
    'WarmupCosineLR',
    'allow_mmengine_checkpoints',
]

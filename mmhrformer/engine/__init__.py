"""What training needs beside the models; importing this registers it."""

from .bfloat16_hook import BFloat16PoseHook
from .compile_hook import CompileBlocksHook
from .cpu_dist import CPUDistributedDataParallel
from .cuda_graph_hook import CUDAGraphHook
from .optim import DecayGroupsConstructor
from .preflight import PreflightChecks
from .safe_checkpoints import ResumableSeedHook, SafeCheckpointHook
from .safe_globals import allow_mmengine_checkpoints
from .schedulers import WarmupCosineLR

__all__ = [
    'BFloat16PoseHook',
    'CPUDistributedDataParallel',
    'CUDAGraphHook',
    'CompileBlocksHook',
    'DecayGroupsConstructor',
    'PreflightChecks',
    'ResumableSeedHook',
    'SafeCheckpointHook',
    'WarmupCosineLR',
    'allow_mmengine_checkpoints',
]

"""The parts of HRFormer; importing this registers them."""

from __future__ import annotations

from ..registry import FRAMEWORK_CLASSES, import_framework_class
from .attention import LocalWindowSelfAttention
from .block import HRFormerBlock
from .ffn import FFN, DWConvFFN
from .fusion_neck import HRFormerFusion
from .hrformer import ARCHS, HRFormer
from .losses import OHEMCrossEntropyLoss, WeightedCrossEntropyLoss
from .shifted_attention import ShiftedWindowSelfAttention

__all__ = [
    'ARCHS',
    'FFN',
    'DWConvFFN',
    'HRFormer',
    'HRFormerBlock',
    'HRFormerFusion',
    'LocalWindowSelfAttention',
    'OHEMCrossEntropyLoss',
    'ShiftedWindowSelfAttention',
    'WeightedCrossEntropyLoss',
]


def __getattr__(name: str) -> type:
    if name in FRAMEWORK_CLASSES:
        return import_framework_class(name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

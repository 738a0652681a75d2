"""The backbone, heads, necks and losses of HRFormer; importing this package registers them."""

from __future__ import annotations

from ..registry import FRAMEWORK_CLASSES, import_framework_class
from .ablations.plain_ffn import FFN
from .ablations.shifted_attention import ShiftedWindowSelfAttention
from .attention import LocalWindowSelfAttention
from .block import HRFormerBlock
from .ffn import DWConvFFN
from .fusion_neck import HRFormerFusion
from .hrformer import ARCHS, HRFormer
from .losses import OHEMCrossEntropyLoss, WeightedCrossEntropyLoss

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

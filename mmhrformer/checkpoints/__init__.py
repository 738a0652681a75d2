"""Checkpoints of every HRFormer code: read safely, told apart, translated, loaded."""

from .dialects import Report, convert, detect_dialect, resize_bias_table, unwrap
from .loading import load_checkpoint
from .reading import read_checkpoint

__all__ = [
    'Report',
    'convert',
    'detect_dialect',
    'load_checkpoint',
    'read_checkpoint',
    'resize_bias_table',
    'unwrap',
]

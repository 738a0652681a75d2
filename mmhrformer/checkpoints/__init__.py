"""Checkpoints of all HRFormer codes: the zoo, safe reading, conversion, loading, writing."""

from .contents import unwrap
from .dialects import Report, convert, detect_dialect, resize_bias_table
from .download import DownloadError, cache_folder
from .loading import load_checkpoint
from .reading import read_checkpoint
from .writing import to_dialect, wrap, write_checkpoint
from .zoo import Source, ZooModel, fetch, find_model, find_source, list_models, read_zoo

__all__ = [
    'DownloadError',
    'Report',
    'Source',
    'ZooModel',
    'cache_folder',
    'convert',
    'detect_dialect',
    'fetch',
    'find_model',
    'find_source',
    'list_models',
    'load_checkpoint',
    'read_checkpoint',
    'read_zoo',
    'resize_bias_table',
    'to_dialect',
    'unwrap',
    'wrap',
    'write_checkpoint',
]

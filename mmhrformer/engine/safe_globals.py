"""Types that ``torch.load`` may build when it reads a checkpoint of mmengine.

Since torch 2.6, ``torch.load`` builds only tensors and plain containers unless more types are
allowed, so that a file cannot run code. mmengine's checkpoints also contain the log history (NumPy
arrays in an mmengine object), a method of a scheduler, and metainfo from configs: ``--resume`` and
the stock test tools would refuse them. The names below cover NumPy 1 and 2, as a file contains
those of the version that it was written with.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler

try:
    from numpy._core import multiarray
except ImportError:  # NumPy 1
    from numpy.core import multiarray

METHODS = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}


def stored_method(owner: type, name: str) -> Callable:
    """Stand-in for ``getattr``, by which a file refers to methods; limited to METHODS.

    Examples:
        >>> stored_method(HistoryBuffer, 'mean') is HistoryBuffer.mean
        True
    """
    if not isinstance(owner, type) or name not in METHODS.get(owner, ()):
        raise ValueError(
            f'the checkpoint asks for {name!r} of {owner!r}, which is not needed to resume: it '
            'was not written by mmengine, or a custom log processor added statistics'
        )
    return getattr(owner, name)


def allow_mmengine_checkpoints() -> bool:
    """Allow ``torch.load`` to build the contents of mmengine's checkpoints.

    This affects the current process only, and is safe: none of the types imports, calls or opens
    anything that a file can choose.

    Returns:
        bool: Whether this torch has an allow list; older ones load everything.

    Examples:
        >>> allow_mmengine_checkpoints() == hasattr(torch.serialization, 'add_safe_globals')
        True
    """
    if not hasattr(torch.serialization, 'add_safe_globals'):
        return False
    dtypes = [getattr(np.dtypes, name) for name in _plain_dtypes()]
    functions = [
        (getattr(multiarray, name), f'numpy.{core}.multiarray.{name}')
        for name in ('_reconstruct', 'scalar')
        for core in ('core', '_core')
    ]
    torch.serialization.add_safe_globals(
        [*METHODS, ConfigDict, frozenset, np.ndarray, np.dtype, *dtypes, *functions]
        + [(stored_method, 'builtins.getattr'), (codecs.encode, '_codecs.encode')]
    )
    return True


def _plain_dtypes() -> list[str]:
    """Names of NumPy's dtype classes for numbers and text, not objects."""
    kinds = ('Bool', 'Float', 'Int', 'UInt', 'Long', 'Str')
    return [name for name in dir(np.dtypes) if name.startswith(kinds)]


allow_mmengine_checkpoints()

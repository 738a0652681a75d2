"""Types that torch may build when it reads a checkpoint of mmengine.

Since 2.6, ``torch.load`` builds nothing but tensors and plain containers unless it is allowed to,
so that a file cannot run code. mmengine's checkpoints also hold the history of the log, which is
NumPy arrays in an object of mmengine, a method of a scheduler, and what configs say of data sets:
``--resume`` and the stock test tools would refuse them.
The names below are those of both generations of NumPy, as a file tells the one it was written with.
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
    """Stand-in for ``getattr``, by which a file names methods; it gives those of METHODS alone.

    Examples:
        >>> stored_method(HistoryBuffer, 'mean') is HistoryBuffer.mean
        True
    """
    if not isinstance(owner, type) or name not in METHODS.get(owner, ()):
        raise ValueError(
            f'the checkpoint asks for {name!r} of {owner!r}, which is not needed to train on: it '
            'was not written by mmengine, or a log processor of your own added statistics'
        )
    return getattr(owner, name)


def allow_mmengine_checkpoints() -> bool:
    """Add the contents of mmengine's checkpoints to what ``torch.load`` may build.

    The addition is for this process, and safe: nothing in it imports, calls or opens anything that
    a file can choose.

    Returns:
        bool: Whether this torch has such a list; before 2.6 it reads everything without asking.

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
    """Names of NumPy's classes of data types that hold numbers or text, not objects."""
    kinds = ('Bool', 'Float', 'Int', 'UInt', 'Long', 'Str')
    return [name for name in dir(np.dtypes) if name.startswith(kinds)]


allow_mmengine_checkpoints()

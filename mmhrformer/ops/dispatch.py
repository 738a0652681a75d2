"""Which form of a function runs: the one place that looks at device, gradients and tracing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from . import compiled, cpu, cuda, kernels, reference
from .state import is_compiling, is_transformed

BACKENDS = {
    'reference': reference,
    'compiled': compiled,
    'cpu': cpu,
    'cuda': cuda,
    'kernels': kernels,
}
VARIABLE = 'MMHRFORMER_OPS'

_forced: ContextVar[str | None] = ContextVar('mmhrformer_ops', default=None)


def backend(x: Tensor) -> ModuleType:
    """Pick the module whose functions compute with a tensor.

    Args:
        x (Tensor): What is computed with.

    Returns:
        ModuleType: ``compiled`` under a compiler, ``reference`` if it was asked for, in tracing,
        export and transforms of ``torch.func``, else the module of the device: ``cpu`` or
        ``cuda``, ``reference`` for others.
    """
    if is_compiling():
        return compiled
    name = _forced.get() or os.environ.get(VARIABLE)
    if name:
        return BACKENDS[_check(name)]
    if torch.jit.is_tracing() or is_transformed():
        return reference
    return {'cpu': cpu, 'cuda': cuda}.get(x.device.type, reference)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force a form of all functions in this thread; compilers keep their own.

    Args:
        name (str): A key of :data:`BACKENDS`, such as ``'reference'``.

    Raises:
        ValueError: If there is no such form.

    Examples:
        >>> import torch
        >>> from mmhrformer import ops
        >>> with ops.use('reference'):
        ...     ops.backend(torch.zeros(1)).__name__
        'mmhrformer.ops.reference'
    """
    token = _forced.set(_check(name))
    try:
        yield
    finally:
        _forced.reset(token)


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"{name!r} is no form of mmhrformer's operators ({VARIABLE}, ops.use): choose one of "
            f'{list(BACKENDS)}'
        )
    return name

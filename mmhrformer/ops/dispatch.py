"""Choice of the operator backend: the only place that looks at device, gradients and tracing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from . import compiled, cpu, cuda, kernels, reference
from .kernels import why_not
from .state import forced, is_compiling, is_transformed

BACKENDS = {
    'reference': reference,
    'compiled': compiled,
    'cpu': cpu,
    'cuda': cuda,
    'kernels': kernels,
}
VARIABLE = 'MMHRFORMER_OPS'
# A backend inherits what it does not define from its base.
for module, base in ((compiled, reference), (cpu, reference), (cuda, reference), (kernels, cuda)):
    for name in reference.__all__:
        vars(module).setdefault(name, getattr(base, name))


def backend(x: Tensor) -> ModuleType:
    """Pick the backend, a module with all operators, that suits a tensor.

    Args:
        x (Tensor): First input of the operator.

    Returns:
        ModuleType: ``compiled`` under a compiler; the requested backend, if any; ``reference`` in
        tracing, export and transforms of ``torch.func``; otherwise by device: ``cpu``; ``kernels``
        on a GPU where Triton can run, else ``cuda``; ``reference`` on other devices.

    Raises:
        ValueError: If the requested backend is unknown or cannot run.
    """
    if is_compiling():
        return compiled
    name = forced.get() or os.environ.get(VARIABLE)
    if name:
        if _check(name) == 'kernels' and (reason := why_not(x.device)):
            raise ValueError(f'{VARIABLE} or ops.use requests the kernels, but {reason}')
        return BACKENDS[name]
    if torch.jit.is_tracing() or is_transformed():
        return reference
    if x.is_cuda:
        return cuda if why_not(x.device) else kernels
    return cpu if x.device.type == 'cpu' else reference


def describe() -> str:
    """Describe which operator backend runs here, and why.

    Returns:
        str: Such as ``'kernels (Triton 3.6.0)'``, ``'cpu'`` or ``'reference: MMHRFORMER_OPS'``.

    Raises:
        ValueError: If the requested backend is unknown or cannot run.
    """
    x = torch.empty(0, device='cuda' if torch.cuda.is_available() else 'cpu')
    text = backend(x).__name__.rpartition('.')[2]
    if text == 'kernels':
        import triton

        text += f' (Triton {triton.__version__})'
    reason = VARIABLE if os.environ.get(VARIABLE) else x.is_cuda and why_not(x.device)
    return f'{text}: {reason}' if reason else text


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force a backend for all operators in this thread; compiled code keeps its own.

    Args:
        name (str): A key of :data:`BACKENDS`, such as ``'reference'``.

    Raises:
        ValueError: If there is no such backend.

    Examples:
        >>> import torch
        >>> from mmhrformer import ops
        >>> with ops.use('reference'):
        ...     ops.backend(torch.zeros(1)).__name__
        'mmhrformer.ops.reference'
    """
    token = forced.set(_check(name))
    try:
        yield
    finally:
        forced.reset(token)


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"{name!r} is not a backend of mmhrformer's operators ({VARIABLE}, ops.use): choose "
            f'one of {list(BACKENDS)}'
        )
    return name

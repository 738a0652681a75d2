"""Which form of a function runs: the one place that looks at device, gradients and tracing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from . import compiled, cpu, cuda, kernels, reference
from .kernels import why_not
from .state import forced, is_compiling, is_transformed, needs_grad

BACKENDS = {
    'reference': reference,
    'compiled': compiled,
    'cpu': cpu,
    'cuda': cuda,
    'kernels': kernels,
}
VARIABLE = 'MMHRFORMER_OPS'
# Functions that a form does not have are those of a plainer one.
for form, plainer in ((compiled, reference), (cpu, reference), (cuda, reference), (kernels, cuda)):
    for name in reference.__all__:
        vars(form).setdefault(name, getattr(plainer, name))


def backend(x: Tensor) -> ModuleType:
    """Pick the module whose functions suit a tensor.

    Args:
        x (Tensor): First input of the function.

    Returns:
        ModuleType: ``compiled`` under a compiler, ``reference`` if it was asked for, in tracing,
        export and transforms of ``torch.func``, else what suits the device: ``cpu``; ``cuda``, or
        where no gradient will come back and Triton can run ``kernels``; ``reference`` for others.

    Raises:
        ValueError: If a form was asked for that is unknown or cannot run.
    """
    if is_compiling():
        return compiled
    name = forced.get() or os.environ.get(VARIABLE)
    if name:
        if _check(name) == 'kernels' and (reason := why_not(x.device)):
            raise ValueError(f'{VARIABLE} or ops.use asks for kernels, but {reason}')
        return BACKENDS[name]
    if torch.jit.is_tracing() or is_transformed():
        return reference
    if x.is_cuda:
        # In training only within CUDA graphs, see prefer_kernels.
        return cuda if needs_grad(x) or why_not(x.device) else kernels
    return cpu if x.device.type == 'cpu' else reference


def describe() -> str:
    """Say which forms the functions have here, and why.

    Returns:
        str: Such as ``'kernels in inference, cuda in training (Triton 3.6.0)'``, ``'cpu'`` or
        ``'reference: MMHRFORMER_OPS'``.

    Raises:
        ValueError: If the form that was asked for is unknown or cannot run.
    """
    x = torch.empty(0, device='cuda' if torch.cuda.is_available() else 'cpu')
    names = []
    for x.requires_grad in (False, True):
        with torch.enable_grad():
            names.append(backend(x).__name__.rpartition('.')[2])
    inference, training = names
    said = (
        inference if inference == training else f'{inference} in inference, {training} in training'
    )
    if 'kernels' in names:
        import triton

        said += f' (Triton {triton.__version__})'
    reason = VARIABLE if os.environ.get(VARIABLE) else x.is_cuda and why_not(x.device)
    return f'{said}: {reason}' if reason else said


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
    token = forced.set(_check(name))
    try:
        yield
    finally:
        forced.reset(token)


@contextmanager
def prefer_kernels(device: torch.device) -> Iterator[None]:
    """Take the kernels in training, too, where they can run and no form was asked for.

    In a CUDA graph a training step of HRFormer-S takes 0.58 times as long with them, of -B 0.57;
    launched one by one it may take longer: docs/benchmarks.md.

    Args:
        device (torch.device): Where the training runs.
    """
    asked = forced.get() or os.environ.get(VARIABLE)
    plain = asked or device.type != 'cuda' or why_not(device)
    with nullcontext() if plain else use('kernels'):
        yield


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"{name!r} is no form of mmhrformer's operators ({VARIABLE}, ops.use): choose one of "
            f'{list(BACKENDS)}'
        )
    return name

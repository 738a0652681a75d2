"""The state of a computation: forced form, compiler, transforms, gradients, autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The name of the form of all functions that ops.use forces, see dispatch.py.
forced: ContextVar[str | None] = ContextVar('mmhrformer_ops', default=None)

# Whether torch.compile (or torch.export) is tracing the code; public since torch 2.3.
is_compiling = getattr(torch.compiler, 'is_compiling', torch._utils.is_compiling)


def in_same_form(function: Callable) -> Callable:
    """A function that computes with the form of operators that is forced now, whoever calls it.

    On a GPU, autograd computes again in a thread of its own.
    """
    form = forced.get()

    @wraps(function)
    def run(*args):
        token = forced.set(form)
        try:
            return function(*args)
        finally:
            forced.reset(token)

    return run


def is_transformed() -> bool:
    """Whether ``torch.func`` (vmap, grad, jvp ...) or forward-mode AD is at work."""
    in_func = torch._C._functorch.peek_interpreter_stack() is not None
    return in_func or forward_ad._current_level >= 0


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether there will be a backward pass to one of some tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_dtype(device: str) -> torch.dtype | None:
    """Data type of convolutions and products on a type of devices, None without autocast."""
    if hasattr(torch, 'get_autocast_dtype'):  # torch 2.4 and later ask by device
        is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if is_on else None
    if device == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def converts(x: Tensor) -> bool:
    """Whether a tensor is brought to the data type of the weights without being asked.

    Autocast does so with floating-point numbers; a compiler need not look.
    """
    return is_compiling() or (x.is_floating_point() and autocast_dtype(x.device.type) is not None)


def may_differ(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sizes differ, here or in a trace that is to hold for other images, too."""
    # Files for ONNX are traced at sizes at which all that can differ does.
    is_traced = torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export()
    return is_traced or size != other


def modes() -> list[bool]:
    """The modes of torch on which the result of a module depends."""
    return [torch.is_grad_enabled(), *(autocast_dtype(d) is not None for d in ('cuda', 'cpu'))]

"""The context of a computation: forced backend, compiler, transforms, gradients, autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Name of the operator backend that ops.use forces, see dispatch.py.
forced: ContextVar[str | None] = ContextVar('mmhrformer_ops', default=None)

# Whether torch.compile (or torch.export) is tracing the code; public since torch 2.3.
is_compiling = getattr(torch.compiler, 'is_compiling', torch._utils.is_compiling)


def in_same_backend(function: Callable) -> Callable:
    """Bind a function to the backend that is forced now, whatever thread calls it.

    For recomputation: on a GPU, autograd runs the backward pass in a separate thread.
    """
    name = forced.get()

    @wraps(function)
    def run(*args):
        token = forced.set(name)
        try:
            return function(*args)
        finally:
            forced.reset(token)

    return run


def is_transformed() -> bool:
    """Whether ``torch.func`` (vmap, grad, jvp ...) or forward-mode AD is active."""
    in_func = torch._C._functorch.peek_interpreter_stack() is not None
    return in_func or forward_ad._current_level >= 0


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether any of the tensors will need a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_dtype(device: str) -> torch.dtype | None:
    """Autocast's data type for convolutions and matrix products, None without autocast."""
    if hasattr(torch, 'get_autocast_dtype'):  # since torch 2.4, for any device type
        is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if is_on else None
    if device == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def autocast_converts(x: Tensor) -> bool:
    """Whether autocast converts a tensor, as it does with floating-point numbers.

    Under a compiler the question does not matter: True.
    """
    return is_compiling() or (x.is_floating_point() and autocast_dtype(x.device.type) is not None)


def may_differ(size: Sequence[int], other: Sequence[int], factor: int = 1) -> bool:
    """Whether ``size * factor`` and another size differ, or may when a trace is reused."""
    # ONNX export traces at a size at which everything that can differ does.
    is_traced = torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export()
    return is_traced or any(n * factor != m for n, m in zip(size, other))


def modes() -> list[bool]:
    """The global modes of torch that affect the result of a module."""
    return [torch.is_grad_enabled(), *(autocast_dtype(d) is not None for d in ('cuda', 'cpu'))]

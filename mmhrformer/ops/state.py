"""What is being done with a computation besides running it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Whether torch.compile (or torch.export) is tracing the code; public since torch 2.3.
is_compiling = getattr(torch.compiler, 'is_compiling', torch._utils.is_compiling)


def is_transformed() -> bool:
    """Whether ``torch.func`` (vmap, grad, jvp ...) or forward-mode AD is at work."""
    in_func = torch._C._functorch.peek_interpreter_stack() is not None
    return in_func or forward_ad._current_level >= 0


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether there will be a backward pass to one of some tensors."""
    learned = (tensor is not None and tensor.requires_grad for tensor in tensors)
    return torch.is_grad_enabled() and any(learned)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of a tensor in a convolution or product, None where it is off."""
    device = x.device.type
    if hasattr(torch, 'get_autocast_dtype'):  # torch 2.4 and later ask by device
        is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if is_on else None
    if device == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None

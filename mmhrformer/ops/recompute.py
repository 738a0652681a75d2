"""Less memory in training: cheap steps are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as hooks
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import checkpoint

from . import reference
from .state import in_same_form, is_compiling, needs_grad

# Whether something around is recomputed as a whole already.
_inside: ContextVar[bool] = ContextVar('mmhrformer_recompute', default=False)


def is_recomputed() -> bool:
    """Whether something around will be computed again, so that nothing in it need be."""
    return _inside.get()


@contextmanager
def frozen_running_stats(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of normalizations while a forward pass is recomputed."""
    norms = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, count


def recompute(module: nn.Module, function: Callable[..., Tensor], *args) -> Tensor:
    """Call a function, keep nothing of it, and call it again in the backward pass.

    Args:
        module (nn.Module): Module whose running statistics are updated by the first call only.
        function (Callable): Function that calls the module.
        *args: Arguments of the function.

    Returns:
        Tensor: ``function(*args)``.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    if is_compiling():  # compiled code updates running statistics once in any case
        return checkpoint(function, *args, use_reentrant=False)
    calls = count()

    def run(*args) -> Tensor:
        is_first = next(calls) == 0
        token = _inside.set(True)
        try:
            with nullcontext() if is_first else frozen_running_stats(module):
                return function(*args)
        finally:
            _inside.reset(token)

    return checkpoint(in_same_form(run), *args, use_reentrant=False)


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether a module computes what one of some classes does, and nothing else happens.

    Not so if it has a forward function, compiled code, a parametrization or hooks of its own, as
    what LoRA, quantization, pruning, FSDP and the like make of modules.

    Args:
        module (nn.Module): The module.
        *kinds (type): The classes, such as ``nn.Conv2d``.

    Returns:
        bool: Whether it can be called again, or folded, without a difference.
    """
    forward = type(module).forward
    for kind in kinds:
        if isinstance(module, kind) and forward is kind.forward:
            break
    else:
        return False
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )
    compiled = getattr(module, '_compiled_call_impl', None) is not None
    # As is_parametrized(), whose getattr() of what a module does not have takes 2 us.
    parametrized = 'parametrizations' in module._modules
    changed = 'forward' in vars(module) or parametrized or compiled
    return not hooked and not changed


def norm_gelu_conv(x: Tensor, norm: nn.Module, conv: nn.Module | None = None) -> Tensor:
    """:func:`mmhrformer.ops.norm_gelu_conv` with less kept for the backward pass.

    Of three equally large maps that the backward pass needs, the input of the normalization is
    kept. If the normalization is not a plain batch normalization (a synchronized one would
    communicate again), its output is kept, too; all three are if the convolution is not plain.
    Each module is called once, and gradients have the bits of the plain form. HRFormer-S keeps
    0.6 times the memory of the plain form; a training step takes 0.99 to 1.03 times as long.
    """
    modules = [norm] if conv is None else [norm, conv]
    learned = needs_grad(x, *(p for module in modules for p in module.parameters()))
    if is_recomputed() or not learned or not (conv is None or is_plain(conv, nn.Conv2d)):
        return reference.norm_gelu_conv(x, norm, conv)
    y = norm(x).contiguous(memory_format=torch.channels_last)
    if not is_plain(norm, _BatchNorm):
        z = reference.gelu(y)
        return z if conv is None else call_without_input(conv, z, lambda: reference.gelu(y))
    normalize = prepare_norm(x, norm)
    again = []  # the output of the normalization, between two steps of the backward pass

    def gelu_again() -> Tensor:
        again[:] = [normalize()]
        return reference.gelu(again[0])

    z = call_without_input(reference.gelu, y, lambda: again.pop() if again else normalize())
    return z if conv is None else call_without_input(conv, z, gelu_again)


def prepare_norm(x: Tensor, norm: _BatchNorm) -> Callable[[], Tensor]:
    """A function that computes a batch normalization again, and leaves running statistics alone."""
    training = norm.training or norm.running_mean is None
    statistics = (None, None) if training else (norm.running_mean, norm.running_var)

    def normalize() -> Tensor:
        y = F.batch_norm(x, *statistics, norm.weight, norm.bias, training, 0.0, norm.eps)
        return y.contiguous(memory_format=torch.channels_last)

    return normalize


def call_without_input(
    function: Callable[[Tensor], Tensor], x: Tensor, again: Callable[[], Tensor]
) -> Tensor:
    """Call a function whose backward pass is to compute the input again instead of keeping it."""
    # Not the address: that of all tensors without memory, on the meta device, is 0.
    storage, shape = x.untyped_storage()._cdata, x.shape

    def pack(kept: Tensor) -> Tensor | None:
        is_input = kept.untyped_storage()._cdata == storage and kept.shape == shape
        return None if is_input else kept

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return again()

    with saved_tensors_hooks(pack, unpack):
        return function(x)

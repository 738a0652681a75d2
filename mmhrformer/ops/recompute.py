"""Less memory in training: what is cheap is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrize import is_parametrized
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


def recompute(
    module: nn.Module, function: Callable[..., Tensor], *args, is_random: bool = True
) -> Tensor:
    """Call a function, keep nothing of it, and call it again in the backward pass.

    Args:
        module (nn.Module): Whose running statistics are not to be updated a second time.
        function (Callable): What to compute with that module.
        *args: What to compute it of.
        is_random (bool): Whether the function draws random numbers. Defaults to True.

    Returns:
        Tensor: ``function(*args)``.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    options = dict(use_reentrant=False, preserve_rng_state=is_random)
    if is_compiling():  # compiled code updates running statistics once in any case
        return checkpoint(function, *args, **options)
    calls = count()

    def run(*args) -> Tensor:
        is_first = next(calls) == 0
        token = _inside.set(True)
        try:
            with nullcontext() if is_first else frozen_running_stats(module):
                return function(*args)
        finally:
            _inside.reset(token)

    return checkpoint(in_same_form(run), *args, **options)


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether a module computes what one of some classes does, and nothing else happens.

    Not so if it has a forward function, compiled code, a parametrization or hooks of its own, as
    what LoRA, quantization, pruning, FSDP and the like make of modules.

    Args:
        module (nn.Module): The module.
        *kinds (type): The classes, such as ``nn.Conv2d``.

    Returns:
        bool: Whether it can be called again, or folded, without anyone noticing.
    """
    is_known = any(isinstance(module, k) and type(module).forward is k.forward for k in kinds)
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
    changed = 'forward' in vars(module) or is_parametrized(module) or compiled
    return is_known and not hooked and not changed


def norm_gelu_conv(x: Tensor, norm: nn.Module, conv: nn.Module | None = None) -> Tensor:
    """:func:`mmhrformer.ops.norm_gelu_conv` with less kept for the backward pass.

    Of three equally large maps that the backward pass needs, one is kept: the input of the
    normalization. Two are kept if the normalization is not a plain batch normalization (a
    synchronized one would communicate again), all if the convolution is not a plain one.
    """
    plain = reference.norm_gelu_conv
    modules = [norm] if conv is None else [norm, conv]
    learned = needs_grad(x, *(p for module in modules for p in module.parameters()))
    if is_recomputed() or not learned or not (conv is None or is_plain(conv, nn.Conv2d)):
        return plain(x, norm, conv)
    if is_plain(norm, _BatchNorm):
        return recompute(norm, plain, x, norm, conv, is_random=False)
    if conv is None:
        return plain(x, norm)
    return recompute(conv, plain, norm(x), nn.Identity(), conv, is_random=False)

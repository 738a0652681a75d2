"""Whether Triton kernels can run here, asked without importing Triton before it is needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec

import torch
from mmengine.utils import digit_version
from torch import Tensor

from .state import is_compiling, is_transformed

# The first that has tuples in kernels, and the torch that comes with it.
MIN_TRITON, MIN_TORCH = '3.3', '2.7'
# The first with bfloat16 and TF32 in its matrix units.
MIN_CAPABILITY = (8, 0)
# What the kernels compute with.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def why_not(device: torch.device | None = None) -> str:
    """Tell why Triton kernels cannot run.

    Args:
        device (torch.device, optional): The device they are to run on. Defaults to None: only
            the software is looked at.

    Returns:
        str: The reason, empty if they can run.
    """
    if digit_version(torch.__version__) < digit_version(MIN_TORCH):
        return (
            f'torch {torch.__version__} comes with a Triton older than {MIN_TRITON}: '
            f'install torch>={MIN_TORCH}'
        )
    if find_spec('triton') is None:
        return f'Triton is not installed: install triton>={MIN_TRITON}'
    import triton

    if digit_version(triton.__version__) < digit_version(MIN_TRITON):
        return f'triton {triton.__version__} is too old: install triton>={MIN_TRITON}'
    if device is None or (device.type == 'cpu' and os.environ.get('TRITON_INTERPRET') == '1'):
        return ''
    if device.type != 'cuda':
        return f'Triton kernels run on GPUs, not on {device.type}'
    if torch.version.cuda is None:
        return f'torch {torch.__version__} is not built for CUDA: the kernels know NVIDIA GPUs only'
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f'{device} has compute capability {capability}, the kernels need {MIN_CAPABILITY}'
    return ''


def available(device: torch.device | None = None) -> bool:
    """Whether Triton kernels can run, see :func:`why_not`."""
    return not why_not(device)


def refuse_second_derivatives(name: str) -> None:
    """Raise an error in a backward pass that is to be differentiated.

    Gradients are on in such a pass. ``once_differentiable`` would let them pass as constants unless
    the incoming one is differentiated, too.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f'{name} has no second derivatives, which create_graph=True asks for: force the plain '
            "form by ops.use('reference') or MMHRFORMER_OPS=reference"
        )


LIBRARY = torch.library.Library('mmhrformer', 'FRAGMENT')


def thin_operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Make an operator of a function, without gradients, that is called without its dispatch.

    That takes 2 us of a CPU, that of ``torch.library.custom_op`` 10, of ``triton_op`` 15 to 40.

    Args:
        schema (str): Name, arguments and results.
        fake (Callable): What makes results without content.

    Returns:
        Callable: Decorator of the function. The operator is called where somebody records it.
    """
    name = schema[: schema.index('(')]

    def register(function: Callable) -> Callable:
        LIBRARY.define(schema)
        LIBRARY.impl(name, function, 'CompositeExplicitAutograd')
        torch.library.register_fake(f'mmhrformer::{name}', fake, lib=LIBRARY)
        operator = getattr(torch.ops.mmhrformer, name).default

        @wraps(function)
        def call(x: Tensor, *args):
            return (operator if is_recorded(x) else function)(x, *args)

        call.function = function
        return call

    return register


def direct(x: Tensor, *operators: Callable) -> list[Callable]:
    """Functions of :func:`thin_operator` that need not look whether calls are recorded.

    Args:
        x (Tensor): What they will be called with, or what depends on it.
        *operators (Callable): The functions.

    Returns:
        list[Callable]: The functions, for calls that follow at once.
    """
    return [call if is_recorded(x) else call.function for call in operators]


def is_recorded(x: Tensor) -> bool:
    """Whether a call must be one of an operator: something traces, transforms or counts it."""
    return (
        type(x) is not Tensor
        or x.is_meta
        or is_compiling()
        or torch.jit.is_tracing()
        or is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
    )

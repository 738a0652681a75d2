"""Support for Triton kernels: availability checks and operators, without importing Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec

import torch
from mmengine.utils import digit_version
from torch import Tensor

from .state import is_compiling, is_transformed

# The first Triton with tuples in kernels, and the torch that it comes with.
MIN_TRITON, MIN_TORCH = '3.3', '2.7'
# The first with bfloat16 and TF32 tensor cores.
MIN_CAPABILITY = (8, 0)
# The data types that the kernels support.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def why_not(device: torch.device | None = None) -> str:
    """Reason why Triton kernels cannot run.

    Args:
        device (torch.device, optional): Device to run them on. Defaults to None: only the
            installed software is checked.

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
        return f'torch {torch.__version__} is not built for CUDA: the kernels need an NVIDIA GPU'
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f'{device} has compute capability {capability}, the kernels need {MIN_CAPABILITY}'
    return ''


USE_REFERENCE = "force the reference by ops.use('reference') or MMHRFORMER_OPS=reference"


def refuse_second_derivatives(name: str, remedy: str = USE_REFERENCE) -> None:
    """Raise an error in a backward pass with ``create_graph=True``.

    Gradients are enabled in such a pass. ``once_differentiable`` would silently treat the result as
    a constant unless the incoming gradient requires one itself.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f'{name} has no second derivatives, which create_graph=True requires: {remedy}'
        )


def check_tensors(x: Tensor, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Check data type and shapes: kernels do not, and would access memory out of bounds."""
    if x.dtype not in DTYPES:
        raise ValueError(f'x has data type {x.dtype}: convert it to one of {DTYPES}')
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f'{name} has shape {tuple(tensor.shape)}: expected {shape}')


def channels_last(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as the kernels read it; nothing is copied if it is channels-last already.

    In a backward pass it may not be: hooks such as save_on_cpu restore maps in another format.
    """
    return x.contiguous(memory_format=torch.channels_last)


LIBRARY = torch.library.Library('mmhrformer', 'FRAGMENT')


def thin_operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register a function without gradients as an operator, and bypass its dispatch if possible.

    A call takes 2 us on the CPU, one of a ``torch.library.custom_op`` 10, of a ``triton_op`` 15 to
    40.

    Args:
        schema (str): Name, arguments and results.
        fake (Callable): Function that returns empty results, for tracing.

    Returns:
        Callable: Decorator of the function. The operator is called only where calls are recorded.
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
    """Functions of :func:`thin_operator` without the check whether calls are recorded.

    Args:
        x (Tensor): Input of the functions, or a tensor from which it is computed.
        *operators (Callable): The functions.

    Returns:
        list[Callable]: The functions, for immediate calls only.
    """
    return [call if is_recorded(x) else call.function for call in operators]


def is_recorded(x: Tensor) -> bool:
    """Whether calls must go through the operator: they are traced, transformed or counted."""
    return (
        type(x) is not Tensor
        or x.is_meta
        or is_compiling()
        or torch.jit.is_tracing()
        or is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
    )

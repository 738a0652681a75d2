"""Whether Triton kernels can run here, asked without importing Triton before it is needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from mmengine.utils import digit_version

# What torch 2.7 comes with: the first that has tuples in kernels.
MIN_TRITON = '3.3'
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
    if not hasattr(torch.library, 'triton_op'):
        return f'torch {torch.__version__} has no torch.library.triton_op: install torch>=2.7'
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
    """Make an operator of a function, without gradients.

    ``torch.library.custom_op`` does more, and takes 15 us of a CPU in each call where this takes 2.

    Args:
        schema (str): Name, arguments and results.
        fake (Callable): What makes results without content.

    Returns:
        Callable: What turns the function into the operator.
    """
    name = schema[: schema.index('(')]

    def register(function: Callable) -> Callable:
        def run(x: torch.Tensor, *args):
            with torch.cuda.device_of(x):  # Triton launches on the current device
                return function(x, *args)

        LIBRARY.define(schema)
        LIBRARY.impl(name, run, 'CompositeExplicitAutograd')
        torch.library.register_fake(f'mmhrformer::{name}', fake, lib=LIBRARY)
        return getattr(torch.ops.mmhrformer, name).default

    return register

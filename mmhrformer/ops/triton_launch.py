"""Launches of Triton kernels with little CPU overhead. Import this only where Triton can run."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton
from mmengine.utils import digit_version
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# The versions whose launchers take their arguments in the order used below. Check the end of
# JITFunction.run() before adding one.
VERSION = digit_version(triton.__version__)
HAS_KNOWN_LAUNCHER = digit_version('3.3') <= VERSION < digit_version('3.9')
# Where profilers set their hooks; Triton 3.3 has no knobs.
RUNTIME = triton.knobs.runtime if hasattr(triton, 'knobs') else CompiledKernel


class Launch:
    """A launch of a kernel with all arguments bound except the tensors.

    Triton examines each argument of each call to find the compiled kernel, which takes the CPU
    longer than any operator of torch. Here numbers and constants are fixed, so only the tensors
    matter: their data types, whether their addresses are multiples of 16, and the device. New
    combinations, and launches that are watched by hooks, go through Triton.

    Args:
        kernel (JITFunction): Kernel whose arguments are tensors, then numbers, then constants.
        grid (tuple[int, ...]): Numbers of programs.
        *numbers (int | float): Numbers.
        **constants: Constants and Triton's options.

    Attributes:
        compiled (dict): The compiled kernels, by the kinds of tensors.
    """

    def __init__(self, kernel: JITFunction, grid: tuple[int, ...], *numbers, **constants) -> None:
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.numbers, self.constants = numbers, constants
        self.compiled: dict[tuple, tuple] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch the kernel on the device of the first tensor, and its current stream."""
        device = tensors[0].get_device()
        if device >= 0 and device != driver.active.get_current_device():
            with torch.cuda.device(device):
                return self(*tensors)
        addresses, key = [], [device]
        for tensor in tensors:
            if tensor is None:
                addresses.append(None)
                key.append(None)
            else:
                address = tensor.data_ptr()
                addresses.append(address)
                key.append(tensor.dtype)
                if address % 16:
                    key.append('unaligned')
                elif not address and tensor.numel():
                    raise ValueError(
                        f'a {type(tensor).__name__} passed to the kernel {self.kernel.__name__} '
                        'has no memory: compute without kernels, by MMHRFORMER_OPS=cuda'
                    )
                if tensor.get_device() != device:
                    key.append(tensor.get_device())
        key = tuple(key)
        if key not in self.compiled or self._is_watched():
            return self._launch_by_triton(key, tensors)
        _, run, function, metadata, rest = self.compiled[key]
        stream = driver.active.get_current_stream(device)
        # Addresses instead of tensors, about which a launcher would query the driver; no hooks.
        run(*self.grid, stream, function, metadata, None, None, None, *addresses, *rest)

    def _is_watched(self) -> bool:
        """Whether there are hooks, or settings that change the compiled kernels."""
        enter, leave = RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook
        return (
            getattr(enter, 'calls', enter)  # since Triton 3.5 a chain of hooks, possibly empty
            or getattr(leave, 'calls', leave)
            or self.kernel.pre_run_hooks
            or getattr(RUNTIME, 'debug', False)
        )

    def _launch_by_triton(self, key: tuple, tensors: tuple[Tensor | None, ...]) -> None:
        """Launch the kernel through Triton, and keep the compiled kernel."""
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        is_known = HAS_KNOWN_LAUNCHER and isinstance(compiled, CompiledKernel)
        if not is_known or self._is_watched():
            return
        here = driver.active.get_current_device()
        if all(tensor is None or tensor.get_device() == here for tensor in tensors):
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            rest = (*self.numbers, *(self.constants[name] for name in names))
            entry = compiled, compiled.run, compiled.function, compiled.packed_metadata, rest
            self.compiled[key] = entry


@lru_cache(maxsize=4096)  # a model has 50 for each image size
def planned(plan: Callable, *args):
    """Cached result of a function that plans launches: they depend only on its arguments."""
    return plan(*args)


def use_own_launch_only() -> None:
    """Launch everything through Triton from now on, since direct launches do not work here."""
    global HAS_KNOWN_LAUNCHER
    HAS_KNOWN_LAUNCHER = False
    planned.cache_clear()  # drops the launches and their compiled kernels

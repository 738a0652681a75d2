"""Launches of Triton kernels that cost a CPU little. Import this only where Triton can run."""

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

# The versions whose launchers take their arguments in the order below. Read the end of
# JITFunction.run() before adding one.
VERSION = digit_version(triton.__version__)
HAS_KNOWN_LAUNCHER = digit_version('3.3') <= VERSION < digit_version('3.8')
# Where profilers put their hooks; Triton 3.3 has no knobs.
RUNTIME = triton.knobs.runtime if hasattr(triton, 'knobs') else CompiledKernel


class Launch:
    """A launch of a kernel with all of its arguments but the tensors.

    Triton finds out by each argument of each call which of the compiled kernels fits, for which a
    CPU takes longer than for any operator of torch. Numbers and constants are the same in each
    call here, so that tensors are left: by their data types, by whether their addresses are
    multiples of 16, and by the device. For what was not seen before, and where somebody listens to
    launches, Triton is called.

    Args:
        kernel (JITFunction): Kernel whose arguments are tensors, then numbers, then constants.
        grid (tuple[int, ...]): Numbers of programs.
        *numbers (int | float): Numbers.
        **constants: Constants and Triton's options.

    Attributes:
        compiled (dict): What Triton compiled for tensors of a kind.
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
                        f'a {type(tensor).__name__} of the kernel {self.kernel.__name__} has no '
                        'memory of its own: compute without kernels, by MMHRFORMER_OPS=cuda'
                    )
                if tensor.get_device() != device:
                    key.append(tensor.get_device())
        key = tuple(key)
        if key not in self.compiled or self._is_watched():
            return self._launch_by_triton(key, tensors)
        _, run, function, metadata, rest = self.compiled[key]
        stream = driver.active.get_current_stream(device)
        # No data for hooks, and no hooks. A launcher would ask the driver about each tensor.
        run(*self.grid, stream, function, metadata, None, None, None, *addresses, *rest)

    def _is_watched(self) -> bool:
        """Whether there are hooks, or settings of which Triton makes other kernels."""
        enter, leave = RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook
        return (
            getattr(enter, 'calls', enter)  # since Triton 3.5 a chain of hooks, which may be empty
            or getattr(leave, 'calls', leave)
            or self.kernel.pre_run_hooks
            or getattr(RUNTIME, 'debug', False)
        )

    def _launch_by_triton(self, key: tuple, tensors: tuple[Tensor | None, ...]) -> None:
        """Launch the kernel in Triton's own way, and keep what it compiled."""
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


@lru_cache(maxsize=4096)  # a model has 50 for each size of images
def planned(plan: Callable, *args):
    """What a function returns, for which it is called once: numbers decide about launches."""
    return plan(*args)


def use_own_launch_only() -> None:
    """Leave all launches to Triton from now on, since others do not work here."""
    global HAS_KNOWN_LAUNCHER
    HAS_KNOWN_LAUNCHER = False
    planned.cache_clear()  # and with it what was compiled

"""Launches that go around Triton's own, and when calls of operators skip torch's dispatch.

Launched is always the kernel that Triton would launch. Kernels are compiled for a GPU that is not
there, and launched by a driver that takes notes.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from types import SimpleNamespace

import pytest
import torch

from mmhrformer.ops.triton_support import is_recorded, why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as drivers
from triton.runtime.jit import JITFunction

from mmhrformer.ops import triton_launch
from mmhrformer.ops.triton_launch import Launch

HAS_KNOBS = hasattr(triton, 'knobs')


def add(x, y, out, n, free, scale, BLOCK: tl.constexpr):  # noqa: N803
    """A kernel, whose numbers are specialized on but for one."""
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n) * scale + free
    if y is not None:
        value += tl.load(y + i, mask=i < n)
    tl.store(out + i, value, mask=i < n)


class FakeTensor:
    """A tensor without memory."""

    def __init__(self, address: int, dtype: torch.dtype = torch.float32, device: int = 0) -> None:
        self.address, self.dtype, self.device = address, dtype, device

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.device

    def numel(self) -> int:
        return 4


class FakeDriver:
    """Launches nothing, and keeps what it was to launch."""

    def __init__(self) -> None:
        self.device, self.launches, functions = 0, [], itertools.count()
        self.utils = SimpleNamespace(
            # Triton 3.3 has no number of threads.
            load_binary=lambda *args: ('module', next(functions), 0, 0, 1024)[: 4 + HAS_KNOBS],
            get_device_properties=lambda device: dict(max_shared_mem=1 << 17),
            unload_module=lambda module: None,  # since Triton 3.8
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device

    def launcher_cls(self, source, metadata):
        def launch(*args):
            *grid, stream, function, _, _, enter, leave = args[:9]
            numbers = [x.data_ptr() if hasattr(x, 'data_ptr') else x for x in args[9:]]
            self.launches.append((grid, stream, function, numbers))
            for hook in (enter, leave):
                if hook is not None:
                    hook('metadata')

        return launch


@pytest.fixture
def driver(monkeypatch, tmp_path):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    before = vars(drivers).copy()
    drivers.set_active(FakeDriver())
    yield drivers.active
    gc.collect()  # since Triton 3.8 kernels are unloaded by the driver that is active
    vars(drivers).update(before)


@pytest.fixture
def kernel(driver, monkeypatch):
    """The kernel, and the numbers of launches that Triton made itself."""
    kernel = JITFunction(add, do_not_specialize=['free'])
    kernel.runs, run = [], kernel.run

    def counted(*args, **options):
        kernel.runs.append(args)
        return run(*args, **options)

    kernel.run = counted
    return kernel


def tensors(**changes) -> dict:
    made = dict(x=FakeTensor(16), y=FakeTensor(32), out=FakeTensor(48))
    return {**made, **changes}


def check(driver, kernel, launch, **changes) -> tuple:
    """Launch twice, the second time not by Triton, and compare with what Triton launches."""
    args = tensors(**changes).values()
    launch(*args)
    before = len(kernel.runs)
    launch(*args)
    assert len(kernel.runs) == before
    kernel[launch.grid](*args, *launch.numbers, **launch.constants)
    first, second, expected = driver.launches[-3:]
    assert first == second == expected
    return expected[2]  # the function


NUMBERS = (5, 7, 0.5)


def test_the_kernel_is_that_of_triton(driver, kernel):
    launch = Launch(kernel, (3,), *NUMBERS, BLOCK=16, num_warps=1)
    functions = [
        check(driver, kernel, launch, **changes)
        for changes in (
            dict(),
            dict(x=FakeTensor(8)),
            dict(y=FakeTensor(36)),
            dict(x=FakeTensor(8), y=FakeTensor(36)),
            dict(y=FakeTensor(32, torch.float16)),
            dict(y=None),
        )
    ]
    assert len(set(functions)) == len(functions)
    assert check(driver, kernel, launch, x=FakeTensor(1 << 40)) == functions[0]
    grid, stream, _, values = driver.launches[-1]
    assert (grid, stream) == ([3, 1, 1], 100)
    assert values == [1 << 40, 32, 48, 5, 7, 0.5, 16]


def test_numbers_and_constants_have_launches_of_their_own(driver, kernel):
    made = [
        Launch(kernel, (1,), n, free, scale, BLOCK=block, num_warps=warps)
        for n, free, scale, block, warps in (
            (5, 7, 0.5, 16, 1),
            (1, 7, 0.5, 16, 1),
            (32, 7, 0.5, 16, 1),
            (1 << 33, 7, 0.5, 16, 1),
            (5, 1 << 33, 0.5, 16, 1),
            (5, 7, 2, 16, 1),
            (5, 7, 0.5, 32, 1),
            (5, 7, 0.5, 16, 2),
        )
    ]
    functions = [check(driver, kernel, launch) for launch in made]
    assert len(set(functions)) == len(functions)
    # Not specialized on, and a float, which never is.
    assert check(driver, kernel, Launch(kernel, (1,), 5, 16, 3.0, BLOCK=16, num_warps=1)) == 0


def test_other_devices(driver, kernel, monkeypatch):
    @contextlib.contextmanager
    def switch(device: int):
        before, driver.device = driver.device, device
        yield
        driver.device = before

    monkeypatch.setattr(torch.cuda, 'device', switch)
    launch = Launch(kernel, (1,), *NUMBERS, BLOCK=16, num_warps=1)
    there = {name: FakeTensor(16, device=1) for name in ('x', 'y', 'out')}
    for _ in range(2):
        launch(*tensors().values())
        launch(*there.values())
    assert [call[1:3] for call in driver.launches] == 2 * [(100, 0), (101, 1)]
    assert len(kernel.runs) == 2
    # Tensors elsewhere are left to Triton, which looks at each of them.
    for device in (-1, 1):
        for _ in range(2):
            launch(*tensors(y=FakeTensor(32, device=device)).values())
    assert len(kernel.runs) == 6


def test_hooks_are_called(driver, kernel, monkeypatch):
    launch = Launch(kernel, (1,), *NUMBERS, BLOCK=16, num_warps=1)
    check(driver, kernel, launch)
    for name in ('launch_enter_hook', 'launch_exit_hook'):
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(triton_launch.RUNTIME, name, calls.append)
            launch(*tensors().values())
        assert len(calls) == 1
    with monkeypatch.context() as patch:
        patch.setattr(kernel, 'pre_run_hooks', [lambda *args, **options: calls.append(args)])
        launch(*tensors().values())
        assert len(calls) == 2
        # What Triton made then need not be what it makes now.
        other = Launch(kernel, (1,), *NUMBERS, BLOCK=16, num_warps=1)
        other(*tensors().values())
        assert not other.compiled
    check(driver, kernel, launch)


def test_tensors_without_memory_are_refused(driver, kernel):
    """Tensors such as quantized weights have the address 0."""
    launch = Launch(kernel, (1,), *NUMBERS, BLOCK=16, num_warps=1)
    with pytest.raises(
        ValueError, match=r'FakeTensor passed to the kernel add .* MMHRFORMER_OPS=cuda'
    ):
        launch(*tensors(y=FakeTensor(0)).values())
    assert not driver.launches


def test_an_unknown_triton_launches_itself(driver, kernel, monkeypatch):
    monkeypatch.setattr(triton_launch, 'HAS_KNOWN_LAUNCHER', False)
    launch = Launch(kernel, (1,), *NUMBERS, BLOCK=16, num_warps=1)
    for runs in (1, 2):
        launch(*tensors().values())
        assert len(kernel.runs) == runs


def test_plans_are_made_once():
    made = []
    triton_launch.planned.cache_clear()
    for number in (1, 2, 1):
        triton_launch.planned(made.append, number)
    assert made == [1, 2]


def test_own_launches_only(driver, kernel, monkeypatch):
    monkeypatch.setattr(triton_launch, 'HAS_KNOWN_LAUNCHER', True)
    launch = triton_launch.planned(Launch, kernel, (3,), *NUMBERS)
    assert triton_launch.planned(Launch, kernel, (3,), *NUMBERS) is launch
    triton_launch.use_own_launch_only()
    assert triton_launch.planned(Launch, kernel, (3,), *NUMBERS) is not launch
    launch = Launch(kernel, (3,), *NUMBERS, BLOCK=16, num_warps=1)
    for _ in range(3):
        launch(*tensors().values())
    assert len(kernel.runs) == 3


def test_calls_that_somebody_records_are_those_of_operators():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(2)
    assert not is_recorded(x)
    assert is_recorded(torch.zeros(2, device='meta'))
    assert is_recorded(torch.nn.Parameter(x))
    with FlopCounterMode(display=False):
        assert is_recorded(x)
    assert torch.vmap(lambda x: x + int(is_recorded(x)))(x).tolist() == [1, 1]
    assert torch.jit.trace(lambda x: x + int(is_recorded(x)), x, check_trace=False)(x).tolist() == [
        1,
        1,
    ]
    assert torch.compile(lambda x: x + int(is_recorded(x)), backend='eager')(x).tolist() == [1, 1]

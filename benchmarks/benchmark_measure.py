"""Measure steps: time, what is saved for the backward pass, peak memory, operators, start-up."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch._C._profiler import _EventType, _ProfilerEvent
from torch.autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

Step = Callable[[], object]

# Operators that only look at a tensor in another way, or fetch memory. Some copy if they must;
# then they call an operator that does.
IDLE = {
    'alias', 'as_strided', 'as_strided_', 'chunk', 'contiguous', 'detach_', 'detach', 'dropout',
    'empty', 'empty_like', 'empty_strided', 'expand', 'expand_as', 'flatten', 'lift_fresh',
    'narrow', '_nnpack_available', 'permute', 'reshape', '_reshape_alias', 'resize_',
    'resolve_conj', 'resolve_neg', 'result_type', 'select', 'set_', 'slice', 'split',
    'split_with_sizes', 'squeeze', 't', 'to', 'transpose', 'unbind', 'unflatten', '_unsafe_view',
    'unsqueeze', 'view', 'view_as',
}  # fmt: skip


@dataclass
class Times:
    """What was timed of a step.

    Attributes:
        first_call (float): Seconds of the very first call, compilation included.
        calls (int): Calls in each round.
        seconds (list[float]): Seconds of a call in each round, the mean over the round's calls.
    """

    first_call: float = 0.0
    calls: int = 1
    seconds: list[float] = field(default_factory=list)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile.

    Args:
        values (list[float]): At least one value.

    Returns:
        tuple[float, float, float]: The three.

    Examples:
        >>> quartiles([5.0, 1.0, 2.0, 4.0, 3.0])
        (2.0, 3.0, 4.0)
    """
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method='inclusive'))


def summarize(seconds: list[float], baseline: list[float]) -> dict[str, float]:
    """Compare the rounds of a step with those of the baseline.

    Args:
        seconds (list[float]): Seconds of the step in each round.
        baseline (list[float]): Seconds of the baseline in the same rounds.

    Returns:
        dict[str, float]: ``median``, ``q1`` and ``q3`` of the seconds; ``speedup``, the baseline's
        median divided by this median; ``round_speedup``, the median over the rounds of the
        baseline's seconds divided by this step's in the same round, with its quartiles
        ``round_speedup_q1`` and ``round_speedup_q3``.
    """
    q1, median, q3 = quartiles(seconds)
    low, middle, high = quartiles([b / s for b, s in zip(baseline, seconds)])
    return dict(
        median=median,
        q1=q1,
        q3=q3,
        speedup=quartiles(baseline)[1] / median,
        round_speedup=middle,
        round_speedup_q1=low,
        round_speedup_q3=high,
    )


def synchronizer(device: str) -> Step:
    """What waits until everything that was started on a device is done."""
    return torch.cuda.synchronize if device == 'cuda' else lambda: None


def _timed(step: Step, calls: int, wait: Step) -> float:
    """Seconds of a call, over several calls without garbage collection."""
    gc.collect()
    gc.disable()
    wait()
    start = time.perf_counter()
    try:
        for _ in range(calls):
            step()
        wait()
        return (time.perf_counter() - start) / calls
    finally:
        gc.enable()


def time_rounds(
    steps: dict[Hashable, Step],
    rounds: int,
    warmup: int,
    min_time: float,
    device: str,
    tell: Callable[[Hashable, Times], None] = lambda name, times: None,
) -> dict[Hashable, Times]:
    """Time steps in turn, round after round.

    Whatever else the machine does in a round then slows all down. The order rotates.

    Args:
        steps (dict[Hashable, Step]): The steps.
        rounds (int): How often each has its turn.
        warmup (int): Untimed calls before the first round, at least 1.
        min_time (float): Seconds that a turn shall at least take; a step is called again until
            then, as often in each round.
        device (str): ``'cpu'`` or ``'cuda'``.
        tell (Callable): Called after each turn with the step's name and its times so far.

    Returns:
        dict[Hashable, Times]: The times, by the names of the steps.
    """
    wait = synchronizer(device)
    times = {name: Times() for name in steps}
    expected = 0.0
    for name, step in steps.items():
        seconds = [_timed(step, 1, wait) for _ in range(warmup)]
        times[name].first_call = seconds[0]
        times[name].calls = max(1, round(min_time / max(seconds[-1], 1e-6)))
        expected += times[name].calls * seconds[-1] * rounds
    print(f'{rounds} rounds take about {expected:.0f} s', file=sys.stderr, flush=True)
    names = list(steps)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].seconds.append(_timed(steps[name], times[name].calls, wait))
            tell(name, times[name])
    return times


def saved_bytes(forward: Step, excluded: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd keeps for the backward pass.

    Each storage counts once and as a whole, however many tensors look into it. What a function
    hides from autograd's hooks is not seen; compare with the peak memory.

    Args:
        forward (Step): A forward pass; nothing is computed backwards.
        excluded (Iterable[Tensor]): What is there anyway, such as parameters.

    Returns:
        int: The bytes.
    """
    storages = {}

    def pack(tensor: Tensor) -> None:
        # Keeping the storage keeps its address from being used again.
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)

    def unpack(_: None) -> Tensor:
        raise RuntimeError('saved_bytes: the forward pass must not compute gradients')

    with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
        result = forward()
    del result
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known)


def _resident(field_name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    status = Path('/proc/self/status').read_text()
    return int(re.search(rf'{field_name}:\s+(\d+) kB', status)[1]) * 1024


def peak_memory(step: Step, device: str) -> int | None:
    """Measure by how much a step raises the memory in use, at its peak.

    On CUDA it is what torch allocates. On the CPU it is the growth of the resident set of the
    process, a rough figure: the allocator keeps and returns memory as it likes.

    Args:
        step (Step): The step; it must have run before.
        device (str): ``'cpu'`` or ``'cuda'``.

    Returns:
        int | None: Bytes, or None where the system does not tell.
    """
    gc.collect()
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier steps left free would hide the growth
        Path('/proc/self/clear_refs').write_text('5')  # starts the peak anew
        before = _resident('VmRSS')
        step()
        return max(0, _resident('VmHWM') - before)
    except (OSError, TypeError):
        return None


def _operators(node: _ProfilerEvent) -> int:
    """Torch operators that no other operator called."""
    return 1 if node.name.startswith('aten::') else sum(map(_operators, node.children))


def _kernels(node: _ProfilerEvent) -> int:
    """Operators that compute or copy themselves: innermost ones, less :data:`IDLE`."""
    inner = sum(map(_kernels, node.children))
    works = node.name.startswith('aten::') and node.name.removeprefix('aten::') not in IDLE
    return inner or int(works)


def _allocated(node: _ProfilerEvent, device: str) -> int:
    """Bytes allocated on a device."""
    own = 0
    if node.tag == _EventType.Allocation and str(node.extra_fields.device).startswith(device):
        own = max(0, node.extra_fields.alloc_size)
    return own + sum(_allocated(child, device) for child in node.children)


def _own_times(node: _ProfilerEvent) -> Iterator[tuple[str, int]]:
    """Nanoseconds of an operator and of those below it, each without the operators it called."""
    inner = sum(child.duration_time_ns for child in node.children)
    yield node.name, max(0, node.duration_time_ns - inner)
    for child in node.children:
        yield from _own_times(child)


def _top(times: Iterable[tuple[str, float]], count: int) -> list[dict]:
    """The operators (CPU) or kernels (CUDA) that take most of the time, with their shares."""
    totals: dict[str, list[float]] = {}
    for name, duration in times:
        total = totals.setdefault(name, [0.0, 0])
        total[0] += duration
        total[1] += 1
    whole = sum(duration for duration, _ in totals.values()) or 1.0
    ranking = sorted(totals.items(), key=lambda item: -item[1][0])[:count]
    return [dict(name=name, share=t / whole, calls=calls) for name, (t, calls) in ranking]


def _is_kernel(event: FunctionEvent) -> bool:
    """Whether an event is a kernel on a GPU, where spans, as of an optimizer, are listed, too."""
    is_span = getattr(event, 'is_user_annotation', False)
    is_copy = event.name.startswith(('Memcpy', 'Memset'))
    return event.device_type == DeviceType.CUDA and not is_span and not is_copy


def profile(step: Step, device: str, count: int = 10) -> dict:
    """Count what a step does.

    Args:
        step (Step): The step; it must have run before.
        device (str): ``'cpu'`` or ``'cuda'``.
        count (int): How many operators or kernels to name. Defaults to 10.

    Returns:
        dict: ``operators``, the torch operators that no other operator called; ``kernels``, on
        CUDA what ran there, on the CPU the operators that compute or copy themselves, without
        code that torch.compile made; ``launches``, on CUDA the calls that launched kernels or
        graphs of them; ``allocated``, bytes that were allocated on the device, those that were
        returned in between counted again; ``top``, the operators (CPU) or kernels (CUDA) by
        their share of the time.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == 'cuda')
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
        synchronizer(device)()
    # Only this tree has the callers right. events() finds them by time stamps that torch 2.1 rounds
    # to microseconds: a short operator may lie outside its caller there, or have a negative time.
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    events = list(profiler.events())
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    timed = [item for node in tree for item in _own_times(node)]
    kernels, launches = sum(map(_kernels, tree)), None
    if device == 'cuda':
        timed = [
            (event.name, event.time_range.elapsed_us()) for event in events if _is_kernel(event)
        ]
        kernels = len(timed)
        launches = sum(bool(re.match('(cuda|cu)(Graph)?Launch', event.name)) for event in on_cpu)
    return dict(
        operators=sum(map(_operators, tree)),
        kernels=kernels,
        launches=launches,
        allocated=sum(_allocated(node, device) for node in tree),
        top=_top(timed, count),
    )


def time_snippets(snippets: dict[str, str], rounds: int, threads: int) -> dict[str, list[float]]:
    """Time Python code in fresh processes, in turn; the start of Python itself is not timed.

    Args:
        snippets (dict[str, str]): Code by name.
        rounds (int): How often each has its turn. One more, untimed, comes before.
        threads (int): CPU threads of the processes.

    Returns:
        dict[str, list[float]]: Seconds in each round, by name.

    Raises:
        RuntimeError: If code fails; with the end of its output.
    """
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONWARNINGS='ignore')
    env['PYTHONPATH'] = os.pathsep.join(path for path in sys.path if path)
    seconds = {name: [] for name in snippets}
    for turn in range(rounds + 1):
        for name, code in snippets.items():
            code = f'import time\nstart = time.perf_counter()\n{code}\n'
            code += "print('seconds', time.perf_counter() - start)"
            command = [sys.executable, '-c', code]
            streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            done = subprocess.run(command, env=env, text=True, **streams)
            if done.returncode:
                raise RuntimeError(f'start-up of {name} failed:\n{done.stdout[-3000:]}')
            if turn:
                seconds[name].append(float(re.findall(r'^seconds (\S+)', done.stdout, re.M)[-1]))
    return seconds

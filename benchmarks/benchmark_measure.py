"""Measurement of steps: time, memory, operators, and startup of new processes."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import timeit
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch._C._profiler import _EventType, _ProfilerEvent
from torch.autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity
from torch.utils.benchmark import Measurement, TaskSpec, timer

Step = Callable[[], object]

# Operators that only create views or allocate memory. Those that copy if needed call another
# operator for it.
IDLE = {
    'alias', 'as_strided', 'as_strided_', 'chunk', 'contiguous', 'detach_', 'detach', 'dropout',
    'empty', 'empty_like', 'empty_strided', 'expand', 'expand_as', 'flatten', 'lift_fresh',
    'narrow', '_nnpack_available', 'permute', 'reshape', '_reshape_alias', 'resize_',
    'resolve_conj', 'resolve_neg', 'result_type', 'select', 'set_', 'slice', 'split',
    'split_with_sizes', 'squeeze', 't', 'to', 'transpose', 'unbind', 'unflatten', '_unsafe_view',
    'unsqueeze', 'view', 'view_as',
}  # fmt: skip


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile.

    Examples:
        >>> quartiles([5.0, 1.0, 2.0, 4.0, 3.0])
        [2.0, 3.0, 4.0]
    """
    return np.percentile(values, (25, 50, 75)).tolist()


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
    found = dict(zip(('q1', 'median', 'q3'), quartiles(seconds)))
    found['speedup'] = quartiles(baseline)[1] / found['median']
    names = ('round_speedup_q1', 'round_speedup', 'round_speedup_q3')
    return {**found, **dict(zip(names, quartiles([b / s for b, s in zip(baseline, seconds)])))}


def _timed(step: Step, calls: int) -> float:
    """Time some calls, including GPU work, without garbage collection."""
    gc.collect()
    # Timer.timeit of torch.utils.benchmark would add two untimed calls each time.
    return timeit.Timer(step, timer=timer).timeit(calls)


def time_rounds(
    steps: dict[Hashable, Step],
    rounds: int,
    warmup: int,
    min_time: float,
    report: Callable[[Hashable, list[float]], None] = lambda name, seconds: None,
) -> dict[Hashable, Measurement]:
    """Time steps interleaved, round by round, so that other load affects all of them.

    The order rotates.

    Args:
        steps (dict[Hashable, Step]): The steps.
        rounds (int): Number of rounds.
        warmup (int): Untimed calls before the first round, at least 1.
        min_time (float): Minimum seconds of a measurement; short steps are repeated, equally often
            in each round.
        report (Callable): Called after each measurement with the step's name and the seconds per
            call in all of its rounds so far.

    Returns:
        dict[Hashable, Measurement]: The measurements by name of the step: one time per round, and
        in ``metadata`` the seconds of the very first call, including compilation.
    """
    found, expected = {}, 0.0
    for name, step in steps.items():
        seconds = [_timed(step, 1) for _ in range(warmup)]
        calls = max(1, round(min_time / max(seconds[-1], 1e-6)))
        spec = TaskSpec(stmt=str(name), setup='', num_threads=torch.get_num_threads())
        found[name] = Measurement(calls, [], spec, metadata=dict(first_call=seconds[0]))
        expected += calls * seconds[-1] * rounds
    print(f'{rounds} rounds take about {expected:.0f} s', file=sys.stderr, flush=True)
    names = list(steps)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = _timed(steps[name], found[name].number_per_run)
            found[name].raw_times.append(seconds)
            report(name, found[name].times)
    return found


def saved_bytes(forward: Step, excluded: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd keeps for the backward pass.

    Each storage counts once and as a whole, even if several tensors share it. Tensors that a
    function hides from autograd's hooks are not counted; compare with the peak memory.

    Args:
        forward (Step): A forward pass without backward pass.
        excluded (Iterable[Tensor]): Tensors that are in memory anyway, such as parameters.

    Returns:
        int: The number of bytes.
    """
    storages = {}

    def pack(tensor: Tensor) -> None:
        # Keep the storage, so that its address is not reused.
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)

    def unpack(_: None) -> Tensor:
        raise RuntimeError('saved_bytes: the forward pass must not compute gradients')

    with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
        result = forward()
    del result
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known)


# ---------------------------------------------------------------- profiles


def _trace(step: Step, device: str) -> tuple[list[_ProfilerEvent], list[FunctionEvent]]:
    """Profile a step; return its call tree and the list of its events."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == 'cuda')
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    # Only this tree has correct callers. events() determines them from timestamps, which torch 2.1
    # rounds to microseconds: a short operator may lie outside its caller, or take negative time.
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    return tree, list(profiler.events())


def _walk(tree: Iterable[_ProfilerEvent]) -> Iterator[_ProfilerEvent]:
    """All nodes of a call tree."""
    for node in tree:
        yield node
        yield from _walk(node.children)


def _operators(node: _ProfilerEvent) -> int:
    """Number of torch operators not called by other operators."""
    return 1 if node.name.startswith('aten::') else sum(map(_operators, node.children))


def _kernels(node: _ProfilerEvent) -> int:
    """Number of operators that compute or copy: innermost ones, except :data:`IDLE`."""
    inner = sum(map(_kernels, node.children))
    works = node.name.startswith('aten::') and node.name.removeprefix('aten::') not in IDLE
    return inner or int(works)


def _allocations(tree: list[_ProfilerEvent], device: str) -> list[int]:
    """Bytes of each allocation on a device in chronological order, negative for freed memory."""
    found = [node for node in _walk(tree) if node.tag == _EventType.Allocation]
    found = [node for node in found if str(node.extra_fields.device).startswith(device)]
    found.sort(key=lambda node: node.start_time_ns)
    return [node.extra_fields.alloc_size for node in found]


def _own_time(node: _ProfilerEvent) -> int:
    """Nanoseconds of a call, excluding nested calls."""
    return max(0, node.duration_time_ns - sum(child.duration_time_ns for child in node.children))


def _top(times: list[tuple[str, float]], count: int) -> list[dict]:
    """The names with the most time, with their shares and numbers of calls."""
    totals, calls = Counter(), Counter(name for name, _ in times)
    for name, duration in times:
        totals[name] += duration
    whole = totals.total() or 1
    return [dict(name=x, share=t / whole, calls=calls[x]) for x, t in totals.most_common(count)]


def _is_kernel(event: FunctionEvent) -> bool:
    """Whether an event is a kernel on a GPU, not a span (as of an optimizer) or a copy."""
    is_span = getattr(event, 'is_user_annotation', False)
    is_copy = event.name.startswith(('Memcpy', 'Memset'))
    return event.device_type == DeviceType.CUDA and not is_span and not is_copy


def peak_memory(step: Step, device: str) -> int:
    """Peak bytes allocated by torch in a step, relative to those before it."""
    gc.collect()
    return max(accumulate(_allocations(_trace(step, device)[0], device)), default=0)


def profile(step: Step, device: str, count: int = 10) -> dict:
    """Count the operators, kernels and allocations of a step.

    Args:
        step (Step): The step; it must have run before.
        device (str): ``'cpu'`` or ``'cuda'``.
        count (int): Number of operators or kernels to list. Defaults to 10.

    Returns:
        dict: ``operators``, the torch operators not called by other operators; ``kernels``, on
        CUDA the kernels, on the CPU the operators that compute or copy, without code compiled by
        torch.compile; ``launches``, on CUDA the launches of kernels or graphs; ``allocated``, the
        sum of all allocations on the device in bytes; ``top``, the operators (CPU) or kernels
        (CUDA) by their share of the time.
    """
    tree, events = _trace(step, device)
    timed = [(node.name, _own_time(node)) for node in _walk(tree)]
    kernels, launches = sum(map(_kernels, tree)), None
    if device == 'cuda':
        spans = [event for event in events if _is_kernel(event)]
        timed = [(event.name, event.time_range.elapsed_us()) for event in spans]
        calls = [event.name for event in events if event.device_type == DeviceType.CPU]
        kernels = len(timed)
        launches = sum(bool(re.match('(cuda|cu)(Graph)?Launch', name)) for name in calls)
    return dict(
        operators=sum(map(_operators, tree)),
        kernels=kernels,
        launches=launches,
        allocated=sum(size for size in _allocations(tree, device) if size > 0),
        top=_top(timed, count),
    )


# ---------------------------------------------------------------- startup

SNIPPET = """import time
start = time.perf_counter()
{}
print('seconds', time.perf_counter() - start)"""


def time_snippets(snippets: dict[str, str], rounds: int, threads: int) -> dict[str, list[float]]:
    """Time Python code in new processes, interleaved, without the startup of Python itself.

    Args:
        snippets (dict[str, str]): Code by name.
        rounds (int): Number of rounds, after an untimed one.
        threads (int): CPU threads of the processes.

    Returns:
        dict[str, list[float]]: Seconds in each round, by name.

    Raises:
        RuntimeError: If code fails; contains the end of its output.
    """
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONWARNINGS='ignore')
    env['PYTHONPATH'] = os.pathsep.join(path for path in sys.path if path)
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True)
    seconds = {name: [] for name in snippets}
    for turn in range(rounds + 1):
        for name, code in snippets.items():
            done = subprocess.run([sys.executable, '-c', SNIPPET.format(code)], **options)
            if done.returncode:
                raise RuntimeError(f'startup of {name} failed:\n{done.stdout[-3000:]}')
            if turn:
                seconds[name].append(float(re.findall(r'^seconds (\S+)', done.stdout, re.M)[-1]))
    return seconds

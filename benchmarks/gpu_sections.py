"""The jobs of gpu_check.py, and the tables of candidates that they time."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import io
import os
import re
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

with contextlib.redirect_stderr(io.StringIO()):  # messages about missing operators
    import mmpose.models  # noqa: F401
    import mmpretrain.models  # noqa: F401
    import mmseg.models  # noqa: F401

import benchmark_measure as bm
import benchmark_peers as bp
import benchmark_steps as bs
import gpu_sweep
from torch import Tensor, nn

from mmhrformer import compile_blocks, graph_backbone, ops
from mmhrformer.deploy.compile import allow_many_versions
from mmhrformer.models import hrformer
from mmhrformer.utils.install_hints import NAMES, installed

# Sections in the order in which they run, and time limits of their jobs in seconds. The tests get
# the rest of the budget.
CAPS = dict(
    env=40, warm=120, infer=150, train=220, seg=90, latency=150, compiled=90, profile=60,
    kernels=100, parity=900,
)  # fmt: skip
SECTIONS = [name for name in CAPS if name != 'warm']
DTYPE = 'bf16'
PEERS = ('hrnet-w32', 'hrnet-w48', 'vit-s', 'vit-b')
KERNELS_NAMED = 20  # in a profile
COMPILING_AHEAD = 10  # processes, for the sweep
# Names of failed jobs; tables skip candidates that were not compiled ahead.
UNFINISHED: set[str] = set()

Emit = Callable[..., None]


class Settings(NamedTuple):
    """Settings from the command line."""

    dry: bool
    archs: tuple[str, ...]
    cudnn_benchmark: bool = False
    rounds: int = 7
    only: str = ''  # regular expression of the kernels to sweep

    @property
    def device(self) -> str:
        """The device of all candidates."""
        return 'cpu' if self.dry else 'cuda'


class Candidate(NamedTuple):
    """A model and how it is run."""

    base: str  # as in tools/benchmark.py
    arch: str = ''  # architecture of HRFormer
    backend: str = ''  # of mmhrformer.ops, for our models
    # 'graph': in a CUDA graph, in training all but the optimizer; 'compiled': also compiled;
    # 'hook': as with CUDAGraphHook, the backbone in two graphs
    how: str = 'eager'


class Table(NamedTuple):
    """Candidates that are timed interleaved."""

    name: str
    task: str  # 'pose' or 'seg'
    mode: str  # 'infer', cast to bfloat16, or 'train', with autocast
    size: tuple[int, int]
    batch: int
    candidates: list[Candidate]


@dataclass(frozen=True)
class Job:
    """A job that runs in a separate process."""

    name: str
    section: str
    run: Callable[[Emit], None]  # calls its argument with each result
    cap: float  # time limit in seconds
    table: Table | None = None  # its networks are built in advance
    warmers: list[Job] = field(default_factory=list)  # untimed jobs that compile ahead
    # Extracts a row from the log, even if the job failed.
    summary: Callable[[str], dict] | None = None

    def prepare(self) -> None:
        """Build the networks, before processes are forked."""
        for candidate in self.table.candidates if self.table else ():
            network(self.table, candidate)


# ---------------------------------------------------------------- candidates


def ways(candidates: list[Candidate], *hows: str) -> list[Candidate]:
    """All combinations of candidates and ways to run them."""
    return [one._replace(how=how) for one in candidates for how in hows]


def network(table: Table, candidate: Candidate) -> nn.Module:
    """The network of a candidate on the CPU, built once for all memory formats."""
    base = candidate.base.removesuffix('-nchw')
    return _network(base, candidate.arch, table.task, table.size, table.mode == 'train')


@cache
def _network(base: str, arch: str, task: str, size: tuple[int, int], drop: bool) -> nn.Module:
    return bp.build_network(bp.parse_spec(base), task, arch, size, None, drop)


def capture(run: Callable, pool: object, device: str) -> Callable:
    """Capture a function in a CUDA graph and return its replay; on a CPU, return the function."""
    return run if device == 'cpu' else bs.Replay(run, pool)


def make_step(table: Table, candidate: Candidate, settings: Settings, pool: object) -> Callable:
    """The timed step of a candidate: a forward pass, which returns the outputs, or training.

    ``pool`` is memory shared by the CUDA graphs, which never run concurrently.
    """
    trains = table.mode == 'train'
    options = dict(mode=table.mode, device=settings.device, channels_last=True)
    net = copy.deepcopy(network(table, candidate))
    entrant = bs.Entrant(bp.parse_spec(candidate.base), net, SimpleNamespace(**options))
    entrant.prepare(DTYPE)
    if candidate.how == 'compiled':
        allow_many_versions(1024)  # all candidates share the code
        options = dict(backend='eager') if settings.dry else {}
        for module in net.modules():
            if hasattr(module, 'drop_prob'):
                module.drop_prob = float(module.drop_prob)  # torch would trace NumPy numbers
        if candidate.backend:
            compile_blocks(net, **options)
        else:
            entrant.call = torch.compile(net, dynamic=False, **options)
    step = bs.make_step(entrant, bs.Case(table.size, table.batch))
    backend = candidate.backend
    if backend == 'kernels' and settings.dry:
        backend = 'cpu'  # Triton kernels would take minutes on the CPU
    if candidate.how == 'hook' and not settings.dry:
        within(backend, partial(graph_backbone, net, step.images, torch.bfloat16))()
    if candidate.how in ('eager', 'hook'):
        return within(backend, step)
    if trains:
        return captured_training(step, backend, pool, settings.device)
    return capture(within(backend, step), pool, settings.device)


def within(backend: str, step: Callable) -> Callable:
    """Bind a step to a backend of our operators."""

    def run() -> object:
        with ops.use(backend):
            return step()

    return run if backend else step


def captured_training(step: bs.TrainingStep, backend: str, pool: object, device: str) -> Callable:
    """A training step with forward pass, loss and backward pass in one CUDA graph."""
    entrant = step.entrant
    entrant.make_optimizer()

    def run() -> None:
        # Gradients that are None at capture are overwritten by replays, not accumulated.
        entrant.network.zero_grad(set_to_none=True)
        step.backward()

    replay = capture(within(backend, run), pool, device)

    def train() -> None:
        replay()
        entrant.optimizer.step()

    return train


# ---------------------------------------------------------------- tables


def first_call(step: Callable, device: str) -> tuple[object, float]:
    """Run a step twice; return its result and the seconds of the first call.

    The peak memory is that of the second call.
    """
    start = bm.timer()
    step()
    seconds = bm.timer() - start
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    result = step()
    bm.timer()  # synchronizes with the GPU, whose errors appear late
    return result, round(seconds, 3)


def difference(outs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Norm of the difference of the last outputs, relative to the norm of the expected ones."""
    a, b = outs[-1].double(), expected[-1].double()
    return ((a - b).norm() / b.norm()).item()


def ready(table: Table, settings: Settings, emit: Emit) -> Iterator[tuple[Candidate, Callable]]:
    """Build the steps of a table; failures become rows."""
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    device, expected, start = settings.device, {}, time.time()
    pool = None if settings.dry else torch.cuda.graph_pool_handle()
    for candidate in table.candidates:
        if time.time() - start > CAPS[table.name.split()[0]] / 2 and not settings.dry:
            emit(**candidate._asdict(), error='not measured: out of time')
            continue
        if candidate.how == 'compiled' and warm_name(table, candidate) in UNFINISHED:
            emit(**candidate._asdict(), error='not measured: it was not compiled in time')
            continue
        try:
            before = 0 if settings.dry else torch.cuda.memory_allocated()
            step = make_step(table, candidate, settings, pool)
            result, seconds = first_call(step, device)
            row = dict(first_call_s=seconds)
            if device == 'cuda' and candidate.how == 'eager':  # graphs share their memory
                row['peak_mb'] = round((torch.cuda.max_memory_allocated() - before) / 1e6)
            if candidate.arch and table.mode == 'infer':  # candidates with the same weights
                reference = expected.setdefault(candidate.arch, [out.clone() for out in result])
                row['differs'] = difference(result, reference)
            emit(**candidate._asdict(), **row)
            yield candidate, step
        except Exception as err:
            traceback.print_exc()
            emit(**candidate._asdict(), error=f'{type(err).__name__}: {err}'[:500])
        gc.collect()
        if device == 'cuda':
            torch.cuda.empty_cache()


def time_table(table: Table, settings: Settings, emit: Emit) -> None:
    """Time the candidates of a table interleaved, and emit the rounds so far each time.

    A step that raises is skipped from then on. An error of the GPU itself raises at the next CUDA
    call, and ends the process.
    """
    broken = set()

    def guarded(candidate: Candidate, step: Callable) -> None:
        if candidate not in broken:
            try:
                step()
            except Exception as err:
                traceback.print_exc()
                emit(**candidate._asdict(), error=f'{type(err).__name__}: {err}'[:500])
                broken.add(candidate)

    def report(candidate: Candidate, seconds: list[float]) -> None:
        if candidate not in broken:
            emit(**candidate._asdict(), **facts, **measured(table.batch, seconds))

    facts = dict(task=table.task, mode=table.mode, size=table.size, batch=table.batch, dtype=DTYPE)
    steps = {one: partial(guarded, one, step) for one, step in ready(table, settings, emit)}
    options = (2, 1, 0.0) if settings.dry else (settings.rounds, 3, 0.1)
    gc.collect()
    gc.freeze()  # otherwise each collection before a measurement takes 0.2 s
    if steps:
        bm.time_rounds(steps, *options, report)


def measured(batch: int, seconds: list[float]) -> dict:
    """Row with the rounds of a candidate, in milliseconds."""
    low, median, high = (round(1e3 * x, 4) for x in bm.quartiles(seconds))
    rounds = [round(1e3 * x, 4) for x in seconds]
    return dict(ms=median, q1=low, q3=high, images_s=round(1e3 * batch / median, 1), rounds=rounds)


def profile_table(table: Table, settings: Settings, emit: Emit) -> None:
    """Count and list the kernels of the candidates of a table."""
    for candidate, step in ready(table, settings, emit):
        emit(**candidate._asdict(), mode=table.mode, batch=table.batch,
             **bm.profile(step, settings.device, KERNELS_NAMED))  # fmt: skip


def warm_name(table: Table, candidate: Candidate) -> str:
    """The name of the job that compiles a candidate ahead, or '' if none does."""
    way = 'compiled' if candidate.how == 'compiled' else candidate.backend
    if way not in ('compiled', 'kernels'):
        return ''
    what = f'{table.task} {table.mode} {table.batch} {candidate.base} {candidate.arch}'
    return f'warm {what.strip()} {way}'


# ---------------------------------------------------------------- other jobs


def run_env(settings: Settings, emit: Emit) -> None:
    """Emit versions, the card, and its peak rates."""
    versions = installed([*NAMES, 'triton'])
    emit(what='versions', cores=os.cpu_count(), python=sys.version.split()[0], **versions)
    if settings.dry:
        return
    card = torch.cuda.get_device_properties(0)
    emit(what='card', name=card.name, gb=round(card.total_memory / 2**30, 1),
         multiprocessors=card.multi_processor_count, cuda=torch.version.cuda,
         cudnn=torch.backends.cudnn.version())  # fmt: skip
    numbers = torch.randn(2**30, dtype=torch.bfloat16, device='cuda')
    other, square = torch.empty_like(numbers), numbers[: 2**26].view(2**13, 2**13)
    limits = dict(
        copy=lambda: other.copy_(numbers),
        product=lambda: square @ square,
        launch=lambda: numbers[:1].add_(1),
    )
    seconds = {name: x.median for name, x in bm.time_rounds(limits, 5, 3, 0.1).items()}
    emit(what='ceilings', copy_tb_s=2**32 / seconds['copy'] / 1e12,
         bf16_tflops=2 * 2**39 / seconds['product'] / 1e12,
         operator_us=1e6 * seconds['launch'])  # fmt: skip


def run_parity(settings: Settings, emit: Emit) -> None:
    """Run the tests on the GPU, into the log; in a dry run, only collect them."""
    command = [sys.executable, '-m', 'pytest', 'tests/gpu', '-v', '-p', 'no:cacheprovider']
    if importlib.util.find_spec('xdist') is not None:
        command += ['-n', str(min(8, max(1, os.cpu_count() // 2)))]
    command += ['--collect-only'] if settings.dry else []
    env = dict(os.environ, PYTHONUNBUFFERED='1')  # log each test when it is done
    subprocess.run(command, cwd=Path(__file__).parents[1], env=env, check=True)


def outcomes(log: str) -> dict:
    """Numbers of passed, failed and other tests in the output of ``pytest -v``, complete or not.

    Examples:
        >>> outcomes('a.py::b FAILED [ 50%]\\n[gw1] [100%] PASSED a.py::c \\n')
        {'failed': 1, 'passed': 1, 'failures': ['a.py::b']}
        >>> outcomes('[gw0] [ 50%] PASSED a.py::b')['unfinished']
        True
    """
    result = r'(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)'
    found = re.findall(rf'^(\S+::.*?) {result}(?: \(.*\))? +\[ *\d+%\]', log, re.M)
    parallel = re.findall(rf'^\[gw\d+\] \[ *\d+%\] {result} (\S+::.*?) *$', log, re.M)
    found += [(test, outcome) for outcome, test in parallel]
    row = dict(Counter(outcome.lower() for _, outcome in found))
    row['failures'] = [test for test, outcome in found if outcome in ('FAILED', 'ERROR')]
    return row if '[100%]' in log or not found else dict(row, unfinished=True)


# ---------------------------------------------------------------- all tables and jobs


def make_tables(settings: Settings) -> Iterator[tuple[str, Table]]:
    """The tables, with their sections."""
    dry, archs = settings.dry, settings.archs
    size, batch = ((64, 64), 2) if dry else ((256, 192), 64)
    few = 1 if dry else None  # models of each kind
    plain = [Candidate('ours', arch, 'cuda') for arch in archs]
    folded = [Candidate('ours-fused', arch, 'cuda') for arch in archs]
    kernels = [Candidate('ours-fused', arch, 'kernels') for arch in archs]
    padded = [Candidate('ours-fused-padded', arch, 'kernels') for arch in archs if arch == 'base']
    mmpose = [Candidate('mmpose-nchw', arch) for arch in archs]  # as shipped
    peers = [Candidate(name) for name in (PEERS[2:3] if dry else PEERS)]
    models = [*plain, *folded, *kernels, *padded, *mmpose, *peers]
    models = ways(models, 'eager', 'graph')
    for section, number in (('infer', batch), ('latency', 1)):
        yield section, Table(f'infer batch {number}', 'pose', 'infer', size, number, models)
    name, arch = 'seg', 'small' if dry else 'base'
    models = [Candidate('ours-fused', arch, backend) for backend in ('cuda', 'kernels')]
    models += [Candidate('ours-fused-padded', arch, 'kernels'), Candidate('hrnet-w48')]
    models = ways(models[:few], 'eager', 'graph')
    wide = ((64, 64), 1) if dry else ((512, 1024), 4)
    yield 'seg', Table(name, 'seg', 'infer', *wide, models)
    ours = [one._replace(backend=name) for name in ('cuda', 'kernels') for one in plain]
    models = [*ways([*mmpose, *peers[:2]], 'eager', 'graph'), *ways(ours, 'eager', 'graph', 'hook')]
    models += ways([one._replace(backend='reference') for one in plain], 'graph')
    yield 'train', Table('train', 'pose', 'train', size, 2 if dry else 32, models)
    # Compiling the whole HRFormer takes too long.
    models = [*ways(kernels, 'graph'), *ways(peers[:2], 'compiled')]
    yield 'compiled', Table('compiled', 'pose', 'infer', size, batch, models)
    models = [*kernels, *padded, Candidate('hrnet-w48')][:few]
    yield 'profile', Table('profile infer', 'pose', 'infer', size, batch, models)
    models = [one._replace(backend='kernels') for one in plain]
    yield 'profile', Table('profile train', 'pose', 'train', size, 2 if dry else 32, models)


def make_jobs(settings: Settings) -> list[Job]:
    """All jobs, in the order of :data:`SECTIONS`."""

    def job(name: str, section: str, *run: object, **options) -> Job:
        # A dry run gets more time, since it may run on two cores.
        return Job(name, section, partial(*run), 1000 if settings.dry else CAPS[section], **options)

    if settings.dry:
        for arch in hrformer.ARCHS.values():  # the depth does not matter
            arch.update(num_modules=(1, 1, 1), num_blocks=1)
    device = settings.device
    jobs = [job('env', 'env', run_env, settings)]
    jobs += [job('parity', 'parity', run_parity, settings, summary=outcomes)]
    for section, table in make_tables(settings):
        measure = profile_table if section == 'profile' else time_table
        ahead = {} if settings.dry else {warm_name(table, one): one for one in table.candidates}
        warmers = [
            job(name, 'warm', warm, table, one, settings) for name, one in ahead.items() if name
        ]
        jobs.append(
            job(table.name, section, measure, table, settings, table=table, warmers=warmers)
        )
    parts = 0 if settings.dry else COMPILING_AHEAD
    warmers = [
        job(f'warm kernels {part}', 'warm', gpu_sweep.warm, device, settings.only, part, parts)
        for part in range(parts)
    ]
    jobs.append(
        job('kernels', 'kernels', gpu_sweep.run, device, settings.only, capture, warmers=warmers)
    )
    return sorted(jobs, key=lambda job: SECTIONS.index(job.section))


def warm(table: Table, candidate: Candidate, settings: Settings, emit: Emit) -> None:
    """Fill the compiler's caches."""
    if candidate.how != 'compiled':
        candidate = candidate._replace(how='eager')
    make_step(table, candidate, settings, torch.cuda.graph_pool_handle())()
    torch.cuda.synchronize()

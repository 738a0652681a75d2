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

with contextlib.redirect_stderr(io.StringIO()):  # what the frameworks say of absent operators
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

# Sections in the order in which they run, and seconds that a job of theirs may take. The tests have
# the rest of the budget.
CAPS = dict(
    env=40, warm=120, infer=150, train=220, seg=90, compiled=90, profile=60, kernels=100,
    parity=900,
)  # fmt: skip
SECTIONS = [name for name in CAPS if name != 'warm']
DTYPE = 'bf16'
ROUNDS = 7
PEERS = ('hrnet-w32', 'hrnet-w48', 'vit-s', 'vit-b')
KERNELS_NAMED = 20  # by a profile
COMPILING_AHEAD = 6  # processes, for the sweep
# Names of jobs that failed; a table leaves out candidates that were not compiled ahead.
UNFINISHED: set[str] = set()

Emit = Callable[..., None]


class Settings(NamedTuple):
    """The wishes of the command line."""

    dry: bool
    archs: tuple[str, ...]
    cudnn_benchmark: bool = False

    @property
    def device(self) -> str:
        """The device of all candidates."""
        return 'cpu' if self.dry else 'cuda'


class Candidate(NamedTuple):
    """A model, and the way in which it is run."""

    base: str  # as in tools/benchmark.py
    arch: str = ''  # of HRFormer
    backend: str = ''  # of ours: a form of mmhrformer.ops
    # 'graph': in a CUDA graph, in training all but the optimizer; 'compiled': that, too; 'hook': as
    # CUDAGraphHook trains, the backbone in two graphs
    how: str = 'eager'


class Table(NamedTuple):
    """Candidates that are timed in turn."""

    name: str
    task: str  # 'pose' or 'seg'
    mode: str  # 'infer', cast to bfloat16, or 'train', with autocast
    size: tuple[int, int]
    batch: int
    candidates: list[Candidate]


@dataclass(frozen=True)
class Job:
    """The work of a process of its own."""

    name: str
    section: str
    run: Callable[[Emit], None]  # calls its argument with each result
    cap: float  # seconds that it may take
    table: Table | None = None  # whose networks are to be built before
    warmers: list[Job] = field(default_factory=list)  # what to compile ahead, nothing being timed
    # Makes a row of the log, however the job ended.
    summary: Callable[[str], dict] | None = None

    def prepare(self) -> None:
        """Build the networks, for all processes that are forked later."""
        for candidate in self.table.candidates if self.table else ():
            network(self.table, candidate)


# ---------------------------------------------------------------- candidates


def ways(candidates: list[Candidate], *hows: str) -> list[Candidate]:
    """Each candidate in each way."""
    return [one._replace(how=how) for one in candidates for how in hows]


def network(table: Table, candidate: Candidate) -> nn.Module:
    """The network of a candidate on the CPU, built once; memory formats are no part of it."""
    base = candidate.base.removesuffix('-nchw')
    return _network(base, candidate.arch, table.task, table.size, table.mode == 'train')


@cache
def _network(base: str, arch: str, task: str, size: tuple[int, int], drop: bool) -> nn.Module:
    return bp.build_network(bp.parse_spec(base), task, arch, size, None, drop)


def capture(run: Callable, pool: object, device: str) -> Callable:
    """Capture a function in a CUDA graph, and return its replay; on a CPU the function itself."""
    return run if device == 'cpu' else bs.Replay(run, pool)


def make_step(table: Table, candidate: Candidate, settings: Settings, pool: object) -> Callable:
    """The timed step of a candidate: a forward pass, which returns the outputs, or training.

    The pool is the memory of CUDA graphs, which never run at the same time.
    """
    trains = table.mode == 'train'
    options = dict(mode=table.mode, device=settings.device, channels_last=True)
    net = copy.deepcopy(network(table, candidate))
    entrant = bs.Entrant(bp.parse_spec(candidate.base), net, SimpleNamespace(**options))
    entrant.prepare(DTYPE)
    if candidate.how == 'compiled':
        allow_many_versions(1024)  # one piece of code serves all candidates
        options = dict(backend='eager') if settings.dry else {}
        for module in net.modules():
            if hasattr(module, 'drop_prob'):
                module.drop_prob = float(module.drop_prob)  # not of NumPy, which torch would trace
        if candidate.backend:
            compile_blocks(net, **options)
        else:
            entrant.call = torch.compile(net, dynamic=False, **options)
    step = bs.make_step(entrant, bs.Case(table.size, table.batch))
    form = candidate.backend
    if form == 'kernels' and settings.dry:
        form = 'cpu'  # Triton kernels would take minutes there
    if candidate.how == 'hook' and not settings.dry:
        within(form, partial(graph_backbone, net, step.images, torch.bfloat16))()
    if candidate.how in ('eager', 'hook'):
        return within(form, step)
    if trains:
        return captured_training(step, form, pool, settings.device)
    return capture(within(form, step), pool, settings.device)


def within(form: str, step: Callable) -> Callable:
    """A step with a form of our operators."""

    def run() -> object:
        with ops.use(form):
            return step()

    return run if form else step


def captured_training(step: bs.TrainingStep, form: str, pool: object, device: str) -> Callable:
    """A training step with forward pass, loss and backward pass in one CUDA graph."""
    entrant = step.entrant
    entrant.make_optimizer()

    def run() -> None:
        # Gradients that are absent when it is captured are written by a replay, not added to.
        entrant.network.zero_grad(set_to_none=True)
        step.backward()

    replay = capture(within(form, run), pool, device)

    def train() -> None:
        replay()
        entrant.optimizer.step()

    return train


# ---------------------------------------------------------------- tables


def first_call(step: Callable, device: str) -> tuple[object, float]:
    """Run a step twice: its result, and the seconds of the first; the peak is of the second."""
    start = bm.timer()
    step()
    seconds = bm.timer() - start
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    result = step()
    bm.timer()  # waits for the GPU, where errors appear late
    return result, round(seconds, 3)


def difference(outs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Norm of the difference of the last outputs, relative to the norm of the expected ones."""
    a, b = outs[-1].double(), expected[-1].double()
    return ((a - b).norm() / b.norm()).item()


def ready(table: Table, settings: Settings, emit: Emit) -> Iterator[tuple[Candidate, Callable]]:
    """Make the steps of a table; a failure becomes a row."""
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    device, expected, start = settings.device, {}, time.time()
    pool = None if settings.dry else torch.cuda.graph_pool_handle()
    for candidate in table.candidates:
        if time.time() - start > CAPS[table.name.split()[0]] / 2 and not settings.dry:
            emit(**candidate._asdict(), error='not measured: the time is over')
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
            if candidate.arch and table.mode == 'infer':  # those have the same weights
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
    """Time the candidates of a table in turn, and emit the rounds so far after each turn.

    A step that raises is left out from then on. An error of the GPU itself raises wherever CUDA is
    called next, and ends the process.
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

    def tell(candidate: Candidate, seconds: list[float]) -> None:
        if candidate not in broken:
            emit(**candidate._asdict(), **facts, **measured(table.batch, seconds))

    facts = dict(task=table.task, mode=table.mode, size=table.size, batch=table.batch, dtype=DTYPE)
    steps = {one: partial(guarded, one, step) for one, step in ready(table, settings, emit)}
    options = (2, 1, 0.0) if settings.dry else (ROUNDS, 3, 0.1)
    if steps:
        bm.time_rounds(steps, *options, tell)


def measured(batch: int, seconds: list[float]) -> dict:
    """The rounds of a candidate in a row, in milliseconds."""
    low, median, high = (round(1e3 * x, 4) for x in bm.quartiles(seconds))
    rounds = [round(1e3 * x, 4) for x in seconds]
    return dict(ms=median, q1=low, q3=high, images_s=round(1e3 * batch / median, 1), rounds=rounds)


def profile_table(table: Table, settings: Settings, emit: Emit) -> None:
    """Count and name the kernels of the candidates of a table."""
    for candidate, step in ready(table, settings, emit):
        emit(**candidate._asdict(), mode=table.mode, batch=table.batch,
             **bm.profile(step, settings.device, KERNELS_NAMED))  # fmt: skip


def warm_name(table: Table, candidate: Candidate) -> str:
    """The name of the job that compiles a candidate ahead, for all tables; empty if none does."""
    way = 'compiled' if candidate.how == 'compiled' else candidate.backend
    if way not in ('compiled', 'kernels'):
        return ''
    what = f'{table.task} {table.mode} {table.batch} {candidate.base} {candidate.arch}'
    return f'warm {what.strip()} {way}'


# ---------------------------------------------------------------- other jobs


def run_env(settings: Settings, emit: Emit) -> None:
    """Versions, the card, and its ceilings."""
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
    """Run the tests on the GPU, into the log; in a dry run find them only."""
    command = [sys.executable, '-m', 'pytest', 'tests/gpu', '-v', '-p', 'no:cacheprovider']
    if importlib.util.find_spec('xdist') is not None:
        command += ['-n', str(min(8, max(1, os.cpu_count() // 2)))]
    command += ['--collect-only'] if settings.dry else []
    env = dict(os.environ, PYTHONUNBUFFERED='1')  # each line is in the log when its test is done
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


# ---------------------------------------------------------------- all of them


def make_tables(settings: Settings) -> Iterator[tuple[str, Table]]:
    """The tables, with their sections."""
    dry, archs = settings.dry, settings.archs
    size, batch = ((64, 64), 2) if dry else ((256, 192), 64)
    few = 1 if dry else None  # models of each kind
    plain = [Candidate('ours', arch, 'cuda') for arch in archs]
    folded = [Candidate('ours-fused', arch, 'cuda') for arch in archs]
    kernels = [Candidate('ours-fused', arch, 'kernels') for arch in archs]
    padded = [Candidate('ours-fused-padded', arch, 'kernels') for arch in archs if arch == 'base']
    mmpose = [Candidate('mmpose-nchw', arch) for arch in archs]  # as it is shipped
    peers = [Candidate(name) for name in (PEERS[2:3] if dry else PEERS)]
    models = [*plain, *folded, *kernels, *padded, *mmpose, *peers]
    for number in (batch, 1):
        name = f'infer batch {number}'
        yield 'infer', Table(name, 'pose', 'infer', size, number, ways(models, 'eager', 'graph'))
    name, arch = 'seg', 'small' if dry else 'base'
    models = [Candidate('ours-fused', arch, form) for form in ('cuda', 'kernels')]
    models += [Candidate('ours-fused-padded', arch, 'kernels'), Candidate('hrnet-w48')]
    models = ways(models[:few], 'eager', 'graph')
    wide = ((64, 64), 1) if dry else ((512, 1024), 4)
    yield 'seg', Table(name, 'seg', 'infer', *wide, models)
    ours = [one._replace(backend=form) for form in ('cuda', 'kernels') for one in plain]
    models = [*ways([*mmpose, *peers[:2]], 'eager', 'graph'), *ways(ours, 'eager', 'graph', 'hook')]
    models += ways([one._replace(backend='reference') for one in plain], 'graph')
    yield 'train', Table('train', 'pose', 'train', size, 2 if dry else 32, models)
    # HRFormer compiled as a whole takes more than the time that there is.
    models = [*ways(kernels, 'graph'), *ways(peers[:2], 'compiled')]
    yield 'compiled', Table('compiled', 'pose', 'infer', size, batch, models)
    models = [*kernels, Candidate('hrnet-w48')][: few or 3]
    yield 'profile', Table('profile infer', 'pose', 'infer', size, batch, models)
    models = [one._replace(backend='kernels') for one in plain]
    yield 'profile', Table('profile train', 'pose', 'train', size, 2 if dry else 32, models)


def make_jobs(settings: Settings) -> list[Job]:
    """All jobs, in the order of :data:`SECTIONS`."""

    def job(name: str, section: str, *run: object, **options) -> Job:
        # In a dry run nothing is in a hurry: two cores may be all there is.
        return Job(name, section, partial(*run), 1000 if settings.dry else CAPS[section], **options)

    if settings.dry:
        for arch in hrformer.ARCHS.values():  # of the depth nothing depends
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
        job(f'warm kernels {part}', 'warm', gpu_sweep.warm, device, part, parts)
        for part in range(parts)
    ]
    jobs.append(job('kernels', 'kernels', gpu_sweep.run, device, capture, warmers=warmers))
    return sorted(jobs, key=lambda job: SECTIONS.index(job.section))


def warm(table: Table, candidate: Candidate, settings: Settings, emit: Emit) -> None:
    """Fill the compiler's caches."""
    if candidate.how != 'compiled':
        candidate = candidate._replace(how='eager')
    make_step(table, candidate, settings, torch.cuda.graph_pool_handle())()
    torch.cuda.synchronize()

"""Check and measure mmhrformer on a GPU, in one run of a few minutes.

The candidates of a table are timed interleaved, round by round, in a separate process with a time
limit, so that a crash does not affect others. All results go to one file,
FOLDER/<date>-<card>.json, which is valid at any time, up to the last measurement; gpu_table.py
converts it to Markdown.

The parity tests run last, in the remaining time, which may not be enough. Two runs with separate
budgets are equivalent to one:

    python benchmarks/gpu_check.py --out FOLDER --budget 540 --sections parity
    python benchmarks/gpu_check.py --out FOLDER --budget 540 --sections env infer train seg kernels

Other ways to run it:

    python benchmarks/gpu_check.py --out FOLDER --sections infer --archs small
    python benchmarks/gpu_check.py --out FOLDER --dry
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# Processes are forked from this one after all imports. It must not start threads and must not
# initialize CUDA, which mmengine's import would do to check for devices.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'
os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', '4')  # of each of several processes
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / 'benchmarks'), str(ROOT)]

import gpu_sections  # noqa: E402
from gpu_sections import SECTIONS, Job, Settings  # noqa: E402

# The columns that identify a timed candidate.
IDENTITY = ('section', 'table', 'base', 'arch', 'backend', 'how', 'kernel', 'shape', 'option')
MIN_TIME = 15  # remaining seconds needed to start a job


class Report:
    """The file of results, with the facts of the run."""

    def __init__(self, path: Path, facts: dict) -> None:
        self.path = path
        self.start = time.time()
        self.facts, self.rows = facts, {}
        self.write()

    def add(self, *rows: dict) -> None:
        """Add rows and rewrite the file."""
        for row in rows:
            print(json.dumps(row, default=str)[:200], flush=True)
            row = dict(row, at=round(time.time() - self.start, 1))
            # Replace a row of the same candidate with fewer rounds.
            key = tuple(row.get(name) for name in IDENTITY) if 'rounds' in row else len(self.rows)
            self.rows[key] = row
        if rows:
            self.write()

    def write(self) -> None:
        """Write the file atomically."""
        # JSON has no NaN and infinity; write them as text.
        data = {**self.facts, 'rows': list(self.rows.values())}
        data = json.loads(json.dumps(data, default=str), parse_constant=str)
        part = self.path.with_suffix('.part')
        part.write_text(json.dumps(data, indent=1) + '\n')
        part.replace(self.path)


class Child:
    """A job in a forked process, with files for its output and rows, killed at a deadline."""

    def __init__(self, job: Job, folder: Path, deadline: float) -> None:
        self.job, self.deadline, self.start = job, deadline, time.time()
        slug = re.sub(r'[^\w.-]+', '-', job.name)
        self.log, self.rows = folder / f'{slug}.log', folder / f'{slug}.jsonl'
        self.rows.write_text('')
        self.read, self.code = 0, None
        self.process = multiprocessing.get_context('fork').Process(target=self.work)
        self.process.start()

    def work(self) -> None:
        """Run the job, in the child."""
        os.setsid()  # a process group, to kill it with its children
        sys.stdout = sys.stderr = log = self.log.open('w', buffering=1)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        with self.rows.open('a', buffering=1) as file:
            self.job.run(lambda **row: file.write(json.dumps(row, default=str) + '\n'))

    def new_rows(self) -> list[dict]:
        """Rows since the last call."""
        *lines, _ = self.rows.read_text()[self.read :].split('\n')
        self.read += sum(len(line) + 1 for line in lines)
        return [dict(section=self.job.section, table=self.job.name, **json.loads(x)) for x in lines]

    def is_running(self) -> bool:
        """Whether it still runs; kills it after its deadline."""
        is_alive = self.process.is_alive()
        if is_alive and time.time() < self.deadline:
            return True
        self.code = 'timed out' if is_alive else self.process.exitcode
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        return False

    def verdict(self) -> dict:
        """A row with the exit code, the time and the error, if any."""
        row = dict(section='run', job=self.job.name, code=self.code)
        row['seconds'] = round(time.time() - self.start, 1)
        if self.code:
            row['error'] = ''.join(self.log.read_text(errors='replace').splitlines()[-1:])[-500:]
        return row

    def summary(self) -> list[dict]:
        """A row that the job extracts from its log, if it does."""
        if self.job.summary is None:
            return []
        row = self.job.summary(self.log.read_text(errors='replace'))
        return [dict(section=self.job.section, table=self.job.name, **row)]


def follow(children: list[Child], report: Report) -> None:
    """Wait for children, and collect their rows."""
    while children:
        running = [child for child in children if child.is_running()]
        for child in children:
            report.add(*child.new_rows())
            if child not in running:
                report.add(*child.summary(), child.verdict())
                if child.code:
                    gpu_sections.UNFINISHED.add(child.job.name)
        children = running
        time.sleep(0.1)


def card_name(dry: bool) -> str:
    """The name of the GPU for a file name, without initializing CUDA."""
    if dry:
        return 'cpu'
    if shutil.which('nvidia-smi') is None:
        raise SystemExit('gpu_check.py: nvidia-smi not found, so no GPU; --dry runs on the CPU')
    command = ['nvidia-smi', '--query-gpu=name', '--format=csv,noheader']
    names = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    if not names:
        raise SystemExit('gpu_check.py: nvidia-smi lists no GPU; --dry runs on the CPU')
    return re.sub(r'\W+', '-', names[0].removeprefix('NVIDIA ')).lower()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--out', type=Path, required=True, metavar='FOLDER', help='folder for the results')
    add('--budget', type=float, default=540, metavar='SECONDS', help='time limit of the whole run')
    add('--sections', nargs='+', choices=SECTIONS, default=list(SECTIONS), metavar='NAME',
        help=f'sections to run, of {", ".join(SECTIONS)} (all)')  # fmt: skip
    add('--archs', nargs='+', choices=('tiny', 'small', 'base'), default=['small', 'base'])
    add('--rounds', type=int, default=7, help='measurements of each candidate (7)')
    add('--kernels', default='', metavar='REGEX', help='kernels and shapes to sweep (all)')
    add('--cudnn-benchmark', action='store_true', help='as in the configs; takes minutes longer')
    add('--dry', action='store_true', help='tiny sizes on the CPU, to test this script')
    return parser.parse_args(argv)


def make_report(args: argparse.Namespace, argv: list[str]) -> Report:
    """The file of results, with the facts of the run."""
    card = card_name(args.dry)
    args.out.mkdir(parents=True, exist_ok=True)
    git = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty']
    commit = shutil.which('git') and subprocess.run(git, capture_output=True, text=True).stdout
    facts = dict(started=time.strftime('%F %T'), card=card, commit=(commit or '').strip())
    facts['command'] = ' '.join(['python', 'benchmarks/gpu_check.py', *argv])
    return Report(args.out / f'{time.strftime("%F-%H%M")}-{card}.json', facts)


def main(argv: list[str] | None = None) -> int:
    """Run the jobs of the selected sections; return 1 if a job failed."""
    args = parse_arguments(argv)
    report = make_report(args, sys.argv[1:] if argv is None else argv)
    deadline = time.time() + args.budget
    logs = report.path.with_suffix('')
    logs.mkdir(exist_ok=True)
    options = args.cudnn_benchmark, args.rounds, args.kernels
    settings = Settings(args.dry, tuple(args.archs), *options)
    jobs = [job for job in gpu_sections.make_jobs(settings) if job.section in args.sections]

    def start(job: Job) -> Child:
        return Child(job, logs, min(time.time() + job.cap, deadline))

    follow([start(job) for job in jobs if job.section == 'env'], report)
    began = time.time()
    for job in jobs:
        job.prepare()
    gc.freeze()  # otherwise each collection would scan all inherited objects: 0.5 s
    report.add(dict(section='run', job='build networks', seconds=round(time.time() - began, 1)))
    # Untimed jobs run in parallel.
    warmers = {warm.name: warm for job in jobs for warm in job.warmers}
    follow([start(warm) for warm in warmers.values()], report)
    for job in jobs:
        if job.section == 'env':
            continue
        if deadline - time.time() < MIN_TIME:
            report.add(dict(section='run', job=job.name, code='no time left'))
            continue
        follow([start(job)], report)
    report.add(dict(section='run', job='all', seconds=round(time.time() - report.start, 1)))
    print(report.path)
    return int(any(row.get('code') for row in report.rows.values()))


if __name__ == '__main__':
    sys.exit(main())

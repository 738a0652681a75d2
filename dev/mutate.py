"""Mutation testing: apply small mistakes to a copy of the package, and check that tests fail.

    python dev/mutate.py                       # all mutations, in about 8 minutes on two cores
    python dev/mutate.py --only losses         # those whose name contains the word
    python dev/mutate.py --ids                 # print their names
    python dev/mutate.py --check               # check that each still applies; runs no tests
    .venv-modern/bin/python dev/mutate.py --modern  # those of Triton kernels and current torch

The mutations are in mutations.py. Each is applied to a temporary copy of the checkout, where its
tests run until one fails. The exit status is 0 if at least 95 % are caught.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from mutations import MODERN, MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
MIN_CAUGHT = 0.95  # required share of caught mutations
TIERS = 'not slow and not gpu'  # the tests of `make test`
CAUGHT, SURVIVED, TIMED_OUT, NOT_RUN = 'caught', 'SURVIVED', 'TIMED OUT', 'NOT RUN'
# Forks processes that have imported the slow dependencies, but not our package.
SERVER = multiprocessing.get_context('forkserver')
PRELOADED = ['pytest', 'torch', 'mmengine.runner', 'mmcv.cnn', 'mmpretrain.models', 'mmseg.models']
PRELOADED += ['mmpose.models', 'mmpose.datasets', 'mmdet.models']
# The line of pytest's summary that names a test, or a file that cannot be collected.
FAILURE = re.compile(r'^(?:FAILED|ERROR) (\S+\.py(?:::.*?)?)(?: - .*)?$', re.MULTILINE)


class Outcome(NamedTuple):
    """Outcome of a mutation: one of the four words above, and the test that failed."""

    mutation: Mutation
    word: str
    test: str


def mutated(text: str, mutation: Mutation) -> str:
    """Apply a mutation to the content of its file.

    Args:
        text (str): The content.
        mutation (Mutation): The mutation.

    Returns:
        str: The mutated content.

    Raises:
        ValueError: If the mutation does not apply exactly once, or the result is not valid Python.
    """
    count = text.count(mutation.old)
    if count != 1 or mutation.old == mutation.new:
        raise ValueError(
            f'{mutation.name}: {mutation.old!r} occurs {count} times in {mutation.file}, with the '
            f'replacement {mutation.new!r}: expected two different texts, the first of which '
            'occurs once'
        )
    text = text.replace(mutation.old, mutation.new)
    try:
        ast.parse(text)
    except SyntaxError as err:
        raise ValueError(f'{mutation.name}: {mutation.new!r} is not valid Python: {err}') from err
    return text


def check(mutations: Sequence[Mutation], root: Path) -> list[str]:
    """Find mutations that do not apply to the code.

    Args:
        mutations (Sequence[Mutation]): The mutations.
        root (Path): The checkout.

    Returns:
        list[str]: One line per problem.
    """
    names = [mutation.name for mutation in mutations]
    problems = [f'{name}: the name is not unique' for name in {*names} if names.count(name) > 1]
    for mutation in mutations:
        try:
            mutated((root / mutation.file).read_text(encoding='utf-8'), mutation)
        except (OSError, ValueError) as err:
            problems.append(str(err))
        for test in mutation.tests:
            file, _, name = test.partition('::')
            if not (root / file).is_file() or f'def {name}' not in (root / file).read_text():
                problems.append(f'{mutation.name}: there is no {test}')
    return problems


def copy_checkout(folder: Path) -> None:
    """Copy the current files of the checkout to a folder, except those that git ignores."""
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split('\0')):
        if (ROOT / name).is_file():  # not deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_pytest(folder: Path, out: str, args: Sequence[str]) -> None:
    """Run pytest in a copy of the checkout, as the target of a process."""
    os.setsid()  # a process group, to kill it with its children
    os.chdir(folder)
    with open(out, 'wb') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE='1')
    sys.dont_write_bytecode = True  # may be stale, since it is checked by size and second only
    sys.path.insert(0, str(folder))
    import pytest

    sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *args]))


def pytest_in(folder: Path, *args: str, limit: float | None = None) -> tuple[int | None, str]:
    """Run pytest in a copy of the checkout; exit status (None if too slow) and output."""
    with tempfile.NamedTemporaryFile('r', errors='replace') as out:
        process = SERVER.Process(target=run_pytest, args=(folder, out.name, args))
        process.start()
        process.join(limit)
        status = process.exitcode
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return status, out.read()


def try_mutation(mutation: Mutation, folder: Path, limit: float) -> Outcome:
    """Apply a mutation to a copy of the checkout, run its tests there, and revert it."""
    path, start = folder / mutation.file, time.monotonic()
    original = path.read_text(encoding='utf-8')
    path.write_text(mutated(original, mutation), encoding='utf-8')
    try:
        status, output = pytest_in(folder, '-x', '-m', TIERS, *mutation.tests, limit=limit)
    finally:
        path.write_text(original, encoding='utf-8')
    failed = FAILURE.search(output)
    if status is None:
        word = TIMED_OUT
    elif status == 0:
        word = SURVIVED if ' passed' in output else NOT_RUN
    else:
        word = CAUGHT if failed else NOT_RUN
    test = failed[1] if failed else ''
    print(f'{word:<9} {time.monotonic() - start:4.0f} s  {mutation.name}  {test}', flush=True)
    return Outcome(mutation, word, test)


def run(mutations: Sequence[Mutation], jobs: int, limit: float) -> list[Outcome]:
    """Try mutations in parallel, each in its own copy of the checkout."""
    with tempfile.TemporaryDirectory(prefix='mmhrformer-mutations-') as place:
        folders = SimpleQueue()
        for number in range(jobs):
            copy_checkout(Path(place, str(number)))
            folders.put(Path(place, str(number)))

        def attempt(mutation: Mutation) -> Outcome:
            folder = folders.get()
            try:
                return try_mutation(mutation, folder, limit)
            finally:
                folders.put(folder)

        with ThreadPoolExecutor(jobs) as pool:
            outcomes = list(pool.map(attempt, mutations))
        # A test that also fails without the mutation proves nothing.
        tests = sorted({outcome.test for outcome in outcomes if outcome.word == CAUGHT})
        folder = folders.get()
        failed = FAILURE.findall(pytest_in(folder, *tests)[1]) if tests else []
        broken = [test for test in failed if pytest_in(folder, test)[0]]  # also alone
    return [o._replace(word=NOT_RUN) if o.test in broken else o for o in outcomes]


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if enough are caught, or with ``--check`` if all apply."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--only', metavar='PATTERN', default='', help='regular expression of names')
    parser.add_argument('--ids', action='store_true', help='print the names')
    parser.add_argument('--check', action='store_true', help='only check that all mutations apply')
    parser.add_argument('--modern', action='store_true', help='those that need current torch')
    parser.add_argument('--jobs', type=int, default=2, help='mutations in parallel (%(default)s)')
    parser.add_argument('--limit', type=float, default=600, help='seconds per run (%(default)s)')
    options = parser.parse_args(args)
    mutations = MODERN if options.modern else MUTATIONS
    chosen = [mutation for mutation in mutations if re.search(options.only, mutation.name)]
    if not chosen:
        parser.error(f'--only {options.only!r}: no mutation matches, see --ids')
    problems = [] if options.ids else check(chosen, ROOT)
    if problems or options.check or options.ids:
        lines = [mutation.name for mutation in chosen] if options.ids else problems
        print('\n'.join(lines) or f'{len(chosen)} mutations apply')
        return int(bool(problems))
    os.environ['OMP_NUM_THREADS'] = '1'  # before anything is imported
    SERVER.set_forkserver_preload(PRELOADED)
    outcomes = run(chosen, options.jobs, options.limit)
    left = [outcome for outcome in outcomes if outcome.word != CAUGHT]
    share = 1 - len(left) / len(outcomes)
    for outcome in left:
        print(f'{outcome.word}: {outcome.mutation.name}  {outcome.test}')
    print(f'{len(outcomes) - len(left)} of {len(outcomes)} mutations caught, {share:.1%}')
    return int(share < MIN_CAUGHT)


if __name__ == '__main__':
    sys.exit(main())

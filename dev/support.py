"""Test this environment, and write the support matrix of the documentation.

    python dev/support.py run [--parts core cls pose seg]    in the environment in question
    python dev/support.py table                              docs/compatibility.md, from all records

``run`` runs the fast tests (core), and trains the demo of each task with the stock tools, stops it
halfway, resumes and tests it. The results are written to a file in ``docs/support``, one per
environment, and from all files to the page. Failures are recorded as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / 'demo'))

import demo_data
from mmengine.runner import find_latest_checkpoint
from run_demo import DATA, TASKS, DemoError, read_metric, run_tool

from mmhrformer.utils.install_hints import OWNERS, installed

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / 'docs/support'
PAGE = ROOT / 'docs/compatibility.md'
START, END = '<!-- written by dev/support.py -->', '<!-- end -->'
SCOPES = {'cls': 'mmpretrain', 'pose': 'mmpose', 'seg': 'mmseg'}
PACKAGES = (
    'torch',
    'numpy',
    'xtcocotools',
    *(name for owners in OWNERS.values() for name in owners),
)
HALF = {
    'cls': 'train_cfg.max_epochs=3',
    'pose': 'train_cfg.max_epochs=1',
    'seg': 'train_cfg.max_iters=50',
}


def find_versions() -> dict[str, str]:
    """The versions of Python and of relevant distributions, without local version labels."""
    versions = {'python': platform.python_version(), **installed(PACKAGES)}
    return {name: version.split('+')[0] for name, version in versions.items()}


def name_of_record(versions: dict[str, str]) -> str:
    """The file name of an environment's record.

    Args:
        versions (dict[str, str]): Versions of Python and the packages.

    Returns:
        str: The name.

    Raises:
        ValueError: If two packages provide mmcv, or none does.
    """
    found = [f'{name}{versions[name]}' for name in OWNERS['mmcv'] if name in versions]
    if len(found) != 1:
        raise ValueError(
            f'mmcv is provided by {found or "no package"}: see "python -m mmhrformer env"'
        )
    python = versions['python'].rpartition('.')[0]
    return f'py{python}-torch{versions["torch"]}-numpy{versions["numpy"]}-{found[0]}.json'


def run_core(processes: int) -> dict:
    """Run the fast tests in several processes, and count, see :func:`count_tests`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        command = [sys.executable, '-m', 'pytest', '-q', '-m', 'not e2e and not gpu and not slow']
        command += ['--ignore=tests/e2e', f'--junitxml={report}', '-n', str(processes)]
        subprocess.run(command, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS='1'))
        return count_tests(report)


def count_tests(report: Path) -> dict:
    """Count the passed, skipped and failed tests in a report of ``pytest --junitxml``."""
    suite = ElementTree.parse(report).getroot().find('testsuite')
    count = {name: int(suite.get(name)) for name in ('tests', 'skipped', 'failures', 'errors')}
    failed = count['failures'] + count['errors']
    passed = count['tests'] - count['skipped'] - failed
    return dict(passed=passed, skipped=count['skipped'], failed=failed)


def run_task(name: str, folder: Path) -> dict:
    """Train half of a demo, resume it, and test the result.

    Args:
        name (str): A key of ``TASKS``.
        folder (Path): Output folder of the tools.

    Returns:
        dict: ``metric``, its title, and ``value`` in percent.

    Raises:
        DemoError: If a tool failed, or did not resume.
    """
    task, work, test = TASKS[name], folder / 'train', folder / 'test'
    folder.mkdir(parents=True)
    demo_data.TASKS[name](DATA)
    args = [task.config, '--work-dir', str(work)]
    run_tool('train', [*args, '--cfg-options', HALF[name]], folder / 'half.log', threads=1)
    run_tool('train', [*args, '--resume'], folder / 'resumed.log', threads=1)
    if 'resumed epoch' not in (folder / 'resumed.log').read_text():
        raise DemoError(f'{folder}/resumed.log shows no resuming')
    args = [task.config, find_latest_checkpoint(work), '--work-dir', str(test)]
    run_tool('test', args, folder / 'test.log', threads=1)
    return dict(metric=task.metric_title, value=read_metric(test, task.metric) * task.percent)


def run_part(part: str, versions: dict[str, str], processes: int, report: Path | None) -> dict:
    """Run the fast tests or the demo of a task; failures and absent frameworks are results."""
    try:
        if part == 'core':
            return count_tests(report) if report else run_core(processes)
        if not any(name in versions for name in OWNERS[SCOPES[part]]):
            return dict(absent=SCOPES[part])
        with tempfile.TemporaryDirectory() as folder:
            return run_task(part, Path(folder) / part)
    except DemoError as err:
        print(err)
        return dict(error=str(err).strip().splitlines()[-1])


def run(parts: list[str], processes: int, report: Path | None = None) -> Path:
    """Run parts in this environment and record the results.

    Args:
        parts (list[str]): Some of ``'core'``, ``'cls'``, ``'pose'``, ``'seg'``.
        processes (int): Number of processes for the fast tests.
        report (Path, optional): Output of ``pytest --junitxml`` in this environment, to be used
            instead of running the fast tests. Defaults to None.

    Returns:
        Path: The record.
    """
    versions = find_versions()
    path = RECORDS / name_of_record(versions)
    record = json.loads(path.read_text()) if path.exists() else {}
    if record.get('versions') != versions:
        record = dict(versions=versions, parts={})
    for part in parts:
        print(f'{part} ...', flush=True)
        record['parts'][part] = run_part(part, versions, processes, report)
        print(record['parts'][part], flush=True)
    RECORDS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + '\n')
    return path


def cell(result: dict | None) -> str:
    """One cell of the matrix."""
    if result is None:
        return 'not run'
    if 'absent' in result:
        return f'{result["absent"]} not installed'
    if 'error' in result:
        return f'fails: `{result["error"]}`'
    if 'metric' in result:
        return f'{result["metric"]} {result["value"]:.1f} %'
    skipped, failed = result['skipped'], result['failed']
    return f'{result["passed"]} passed, {skipped} skipped' + f', {failed} failed' * bool(failed)


def write_row(record: dict) -> str:
    """One row of the matrix."""
    versions = record['versions']
    packages = ', '.join(f'{name} {versions[name]}' for name in PACKAGES[3:] if name in versions)
    cells = [versions['python'], versions['torch'], versions['numpy'], packages]
    cells += [cell(record['parts'].get(part)) for part in ('core', *SCOPES)]
    return f'| {" | ".join(cells)} |'


def make_table(records: list[dict]) -> str:
    """The matrix in Markdown, the oldest torch first."""

    def key(record: dict) -> list[int]:
        versions = record['versions']
        return [int(part) for name in ('torch', 'python') for part in versions[name].split('.')]

    titles = ['Python', 'torch', 'NumPy', 'packages', 'fast tests']
    titles += ['classification', 'pose', 'segmentation']
    rows = [f'| {" | ".join(titles)} |', '|' + ' :-- |' * len(titles)]
    return '\n'.join([*rows, *map(write_row, sorted(records, key=key))])


def put_table(page: str, table: str) -> str:
    """The page with the table between its markers."""
    before, rest = page.split(START)
    return f'{before}{START}\n\n{table}\n\n{END}{rest.split(END)[1]}'


def read_records() -> list[dict]:
    """All records."""
    return [json.loads(path.read_text()) for path in sorted(RECORDS.glob('*.json'))]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('command', choices=['run', 'table'])
    parts = ['core', *SCOPES]
    parser.add_argument('--parts', nargs='+', choices=parts, default=parts)
    parser.add_argument('--processes', type=int, default=2, help='processes for the fast tests')
    parser.add_argument('--report', type=Path, help='JUnit report of fast tests that have been run')
    args = parser.parse_args()
    if args.command == 'run':
        try:
            print(run(args.parts, args.processes, args.report))
        except (OSError, ValueError) as err:
            parser.error(str(err))
    PAGE.write_text(put_table(PAGE.read_text(), make_table(read_records())))


if __name__ == '__main__':
    main()

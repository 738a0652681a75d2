"""Train, test and draw HRFormer on three small tasks, through the stock entry points.

    python demo/run_demo.py [--tasks cls pose seg] [--out demo_output]

writes the demo datasets (``demo/demo_data.py``), trains and tests the configs of
``configs/demo`` with the train.py and test.py of mmpretrain, mmpose and mmsegmentation, draws
predictions with their visualizers, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import demo_data
from mmengine.runner import find_latest_checkpoint

HERE = Path(__file__).resolve().parent
DATA = Path('data/demo')  # relative to the current folder, as in the configs


class Task(NamedTuple):
    """Title and config of a demo; its metric's key, name in the table and factor to percent."""

    title: str
    config: str
    metric: str
    metric_title: str
    percent: float


TASKS = {
    'cls': Task(
        'classification of digits', 'hrformer-demo_1xb64-6e_digits',
        'accuracy/top1', 'top-1 accuracy', 1,
    ),
    'pose': Task(
        'pose of drawn people', 'td-hm_hrformer-demo_1xb16-2e_figures-96x128',
        'coco/AP', 'AP', 100,
    ),
    'seg': Task(
        'segmentation of drawn scenes', 'ocrnet_hrformer-demo_1xb16-100_scenes-96x96',
        'mIoU', 'mIoU', 1,
    ),
}  # fmt: skip


class DemoError(RuntimeError):
    """A step of the demo failed; the message has the command and the end of its log."""


def run_tool(tool: str, args: list[str], log: Path, threads: int) -> None:
    """Run one of our tools in a separate process, with its output in a log file.

    Args:
        tool (str): ``'train'``, ``'test'`` or ``'demo_pictures'``.
        args (list[str]): Arguments of the tool.
        log (Path): Log file.
        threads (int): Number of CPU threads.

    Raises:
        DemoError: If the tool fails; contains the end of its output.
    """
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONWARNINGS='ignore')
    folder = HERE if tool == 'demo_pictures' else HERE.parent / 'tools'
    command = [sys.executable, str(folder / f'{tool}.py'), *args]
    with log.open('w') as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env).returncode
    if code:
        tail = '\n'.join(log.read_text().splitlines()[-12:])
        raise DemoError(f'{" ".join(command)}\nexited with code {code}; the end of {log}:\n{tail}')


def read_metric(folder: Path, metric: str) -> float:
    """Read a metric from the newest results of a test in its work folder."""
    results = max(folder.glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(results.read_text())[metric]


def run_task(name: str, out: Path, threads: int, say) -> dict:
    """Generate data, train, test and draw one task.

    Args:
        name (str): A key of :data:`TASKS`.
        out (Path): Output folder.
        threads (int): Number of CPU threads.
        say (Callable): Function that prints a line.

    Returns:
        dict: ``metric`` in percent, ``seconds`` and ``pictures``.
    """
    task, start = TASKS[name], time.time()
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    data = demo_data.TASKS[name](DATA)
    say(f'{name}: training ({folder}/train.log)')
    work = folder / 'train'
    run_tool('train', [task.config, '--work-dir', str(work)], folder / 'train.log', threads)
    checkpoint = Path(find_latest_checkpoint(work))
    say(f'{name}: trained in {time.time() - start:.0f} s, testing {checkpoint.name}')
    test = folder / 'test'
    args = [task.config, str(checkpoint), '--work-dir', str(test)]
    run_tool('test', args, folder / 'test.log', threads)
    value = read_metric(test, task.metric) * task.percent
    say(f'{name}: {task.metric_title} {value:.1f}, drawing')
    args = [name, task.config, str(checkpoint), str(data), str(folder)]
    run_tool('demo_pictures', args, folder / 'pictures.log', threads)
    pictures = sorted(folder.glob('*.png'))
    return dict(metric=value, seconds=time.time() - start, pictures=pictures)


def run_all(names: list[str], out: Path) -> dict[str, dict]:
    """Run tasks in parallel on the available cores; return results of :func:`run_task` by name."""
    cores, start = len(os.sched_getaffinity(0)), time.time()
    workers = min(cores, len(names))

    def say(line: str) -> None:
        print(f'[{time.time() - start:4.0f} s] {line}\n', end='', flush=True)

    # The longest first, so that the others run in parallel to it.
    order = sorted(names, key=['pose', 'seg', 'cls'].index)
    with ThreadPoolExecutor(workers) as pool:
        jobs = {
            name: pool.submit(run_task, name, out, max(1, cores // workers), say) for name in order
        }
        return {name: jobs[name].result() for name in names}


def print_table(results: dict[str, dict]) -> None:
    """Print the metrics and the paths of the pictures."""
    print(f'\n{"task":<30}{"metric":<16}{"value":>7}{"time":>9}')
    for name, result in results.items():
        task = TASKS[name]
        row = f'{task.title:<30}{task.metric_title:<16}{result["metric"]:>6.1f}%'
        print(row + f'{result["seconds"]:>7.0f} s')
    print('\npictures:')
    for result in results.values():
        for path in result['pictures']:
            print(f'  {path}')


def main() -> None:
    """Run the demos named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=list(TASKS))
    parser.add_argument('--out', type=Path, default=Path('demo_output'))
    args = parser.parse_args()
    print('Training three small HRFormers on the CPU; this takes 4 to 10 minutes on two cores.')
    try:
        results = run_all(list(dict.fromkeys(args.tasks)), args.out.resolve())
    except (DemoError, ImportError, OSError, ValueError) as err:
        sys.exit(f'\nThe demo stopped: {err}')
    print_table(results)


if __name__ == '__main__':
    main()

"""Plot the curves of training runs, or print how long their iterations took.

Examples:
  python -m mmhrformer analyze_logs plot_curve work_dirs/RUN --keys loss --out loss.png
  python -m mmhrformer analyze_logs plot_curve work_dirs/A work_dirs/B --keys coco/AP --out ap.png
  python -m mmhrformer analyze_logs cal_train_time work_dirs/RUN

RUN is the work folder of a run of any of the three frameworks, or a scalars.json in it. Plotting is
done by a stock analyze_logs.py, which receives all other arguments: that of mmpretrain, which reads
the logs of all three, or if it is not installed, that of mmpose or mmsegmentation, which need
seaborn.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from mmhrformer.cli.launch import run_script, stock_tool

TASKS = ('plot_curve', 'cal_train_time')


def find_logs(runs: list[str]) -> list[Path]:
    """Find the logs of runs.

    Args:
        runs (list[str]): Folders of runs, or logs.

    Returns:
        list[Path]: Their logs. A resumed run has several, in chronological order.

    Raises:
        FileNotFoundError: If a run has no log.
    """
    logs = []
    for run in map(Path, runs):
        found = sorted(run.rglob('vis_data/scalars.json')) if run.is_dir() else [run]
        found = [
            log for log in found if log.suffix == '.json' and log.is_file() and log.stat().st_size
        ]
        if not found:
            raise FileNotFoundError(
                f'there is no log in {str(run)!r}: pass the folder of a run that has logged its '
                'loss at least once, or its vis_data/scalars.json'
            )
        logs += found
    return logs


def choose_script(task: str) -> tuple[Path, list[str]]:
    """Choose the stock script to run.

    Args:
        task (str): One of ``TASKS``.

    Returns:
        tuple[Path, list[str]]: The script, and its arguments that select the task.

    Raises:
        ImportError: If no installed framework has one.
    """
    for scope in ('mmpretrain', 'mmpose', 'mmseg'):
        if importlib.util.find_spec(scope) is None:
            continue
        if scope != 'mmpretrain' and importlib.util.find_spec('seaborn') is None:
            raise ImportError(f"{scope}'s analyze_logs.py needs seaborn: pip install seaborn")
        if scope == 'mmseg' and task != 'plot_curve':  # its only task, which has no name
            continue
        return stock_tool(scope, 'analyze_logs'), [] if scope == 'mmseg' else [task]
    raise ImportError(f'no installed framework has {task}: pip install mmpretrain')


def legends(logs: list[Path], keys: list[str]) -> list[str]:
    """Names of the curves: the stock scripts use the file name, which is the same for all runs."""
    names = [log.parents[2].name if log.parent.name == 'vis_data' else log.stem for log in logs]
    if len(set(names)) < len(names):
        names = [f'{name}/{log.parents[1].name}' for name, log in zip(names, logs)]
    return [f'{name} {key}' for name in names for key in keys]


def main() -> None:
    """Run the command line; exit with a message on failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('task', choices=TASKS, help='what to do')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run, or a log')
    parser.add_argument('--keys', nargs='+', default=['loss'], help='values to plot (loss)')
    parser.add_argument('--out', default='curves.png', help='image file to write (%(default)s)')
    args, others = parser.parse_known_args()
    try:
        logs = find_logs(args.runs)
        script, options = choose_script(args.task)
        options += [str(log.absolute()) for log in logs]
        if args.task == 'plot_curve':
            options += ['--keys', *args.keys, '--out', args.out]
            options += ['--legend', *legends(logs, args.keys)] if '--legend' not in others else []
        run_script(script, options + others)
    except (ImportError, KeyError, OSError, ValueError) as err:
        sys.exit(f'analyze_logs.py: {err}')


if __name__ == '__main__':
    main()

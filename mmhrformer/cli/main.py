"""The commands of ``python -m mmhrformer``, none of which needs mim."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..checkpoints import ZooModel, fetch, list_models, read_zoo
from ..utils.files import whole_file
from ..utils.install_hints import with_fix
from ..version import __version__
from . import environment
from .launch import run_stock_tool, run_tool

PROGRAM = 'python -m mmhrformer'

# Main metric of a task -> factor to convert it to percent.
METRICS = {'Top 1 Accuracy': 1, 'AP': 100, 'mIoU': 1}
# Prefix of a config's name -> its task, as in the results of metafiles.
TASKS = {'td-hm': 'Body 2D Keypoint', 'ocrnet': 'Semantic Segmentation'}
OTHER_TASK = 'Image Classification'

TOOLS = {
    'demo': 'run a model on images and videos, and draw the predictions',
    'browse_dataset': 'draw samples of a dataset as the model gets them',
    'analyze_logs': 'plot the curves of training runs',
    'get_flops': 'count parameters and operations',
    'print_config': 'print a config with everything that it inherits',
    'convert_checkpoint': 'convert a checkpoint to another format',
    'export_onnx': 'export a model to ONNX',
    'onnx_pose': 'estimate poses with an exported model, by onnxruntime',
    'benchmark': 'measure speed and memory',
}


def download(args: list[str]) -> None:
    """Download checkpoints of the zoo, and print their paths."""
    parser = argparse.ArgumentParser(
        prog=f'{PROGRAM} download',
        description='Download and verify published checkpoints of the zoo, and print their paths.',
        epilog=f'Example: {PROGRAM} download td-hm_hrformer-small_8xb32-210e_coco-256x192',
    )
    parser.add_argument(
        'names',
        nargs='+',
        metavar='NAME',
        help='name as printed by `list`, optionally NAME@official or NAME@mmpose',
    )
    parser.add_argument(
        '--dest', type=Path, metavar='DIR', help='copy the files here (default: only to the cache)'
    )
    options = parser.parse_args(args)
    for name in options.names:
        path = fetch(name)
        if options.dest:
            options.dest.mkdir(parents=True, exist_ok=True)
            source, path = path, options.dest / path.name
            with source.open('rb') as original, whole_file(path) as copy:
                shutil.copyfileobj(original, copy)
        print(path)


def reported_results(results: list[dict]) -> str:
    """Format the main results of a metafile: ``'AP 74.0 reported by official repository'``."""
    found = {}
    for result in results:
        for name, scale in METRICS.items():
            if name in result.get('Metrics', {}):
                value = f'{name} {result["Metrics"][name] * scale:.1f}'
                found.setdefault(result['Reported By'], value)
    return '; '.join(f'{value} reported by {who}' for who, value in found.items())


def print_models(args: list[str]) -> None:
    """Print the zoo as a table."""
    parser = argparse.ArgumentParser(
        prog=f'{PROGRAM} list',
        description='List the models of the zoo. The accuracies are those reported for the '
        'published checkpoints; they have not been reproduced with this code yet.',
        epilog=f"Example: {PROGRAM} list 'td-hm*'",
    )
    parser.add_argument(
        'pattern', nargs='?', default='*', help='pattern of the names (default: %(default)s)'
    )
    options = parser.parse_args(args)
    names, zoo = list_models(options.pattern), read_zoo()
    if not names:
        raise ValueError(f'no model of the zoo matches {options.pattern!r}: try `list` alone')
    rows = [('model', 'task', 'parameters', 'weights', 'reported, not measured here')]
    rows += [row_of(zoo[name]) for name in names if not zoo[name].is_ablation]
    ablations = [row_of(zoo[name]) for name in names if zoo[name].is_ablation]
    widths = [max(map(len, column)) for column in zip(*rows, *ablations)]
    if ablations:
        ablations.insert(0, ('\nablations',))
    for row in rows + ablations:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def row_of(model: ZooModel) -> tuple[str, ...]:
    """The row of a model in the table of the zoo."""
    starts = (task for start, task in TASKS.items() if model.name.startswith(start))
    parameters = f'{model.metadata["Parameters"] / 1e6:.1f} M'
    weights = ', '.join(source.origin for source in model.sources) or 'none'
    results = reported_results(model.results)
    return model.name, next(starts, OTHER_TASK), parameters, weights, results


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int | None]]] = {
    'train': (
        'train a config: CONFIG [arguments of the framework]',
        partial(run_stock_tool, 'train'),
    ),
    'test': ('test a checkpoint: CONFIG CHECKPOINT [arguments]', partial(run_stock_tool, 'test')),
    'list': ('list the models of the zoo: [PATTERN]', print_models),
    'download': ('download published checkpoints: NAME ... [--dest DIR]', download),
    'env': ('report installed packages, working features and fixes', environment.main),
    **{name: (text, partial(run_tool, name)) for name, text in TOOLS.items()},
}


def usage() -> str:
    """The help text of the whole program."""
    lines = [f'  {name:<20} {text}' for name, (text, _) in COMMANDS.items()]
    return (
        f'usage: {PROGRAM} COMMAND [arguments]\n\ncommands:\n'
        + '\n'.join(lines)
        + f'\n\nHelp on a command: {PROGRAM} COMMAND --help; version: {PROGRAM} --version\n'
        f'Example: {PROGRAM} list "hrformer-*"'
    )


def main(args: list[str] | None = None) -> int:
    """Run a command.

    Args:
        args (list[str], optional): The command and its arguments. Defaults to the command line.

    Returns:
        int: The exit status.
    """
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ('-h', '--help'):
        print(usage())
        return 0 if args else 2
    if args[0] in ('-V', '--version'):
        print(f'mmhrformer {__version__}')
        return 0
    if args[0] not in COMMANDS:
        names = ', '.join(COMMANDS)
        print(f'mmhrformer: unknown command {args[0]!r}; choose one of {names}', file=sys.stderr)
        return 2
    try:
        return COMMANDS[args[0]][1](args[1:]) or 0
    except ImportError as err:
        print(f'mmhrformer {args[0]}: {with_fix(err)}', file=sys.stderr)
    except (OSError, RuntimeError, ValueError) as err:
        if args[0] not in ('list', 'download'):  # for a tool, the traceback is useful
            raise
        print(f'mmhrformer {args[0]}: {err}', file=sys.stderr)
    return 1

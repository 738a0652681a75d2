"""The commands of ``python -m mmhrformer``: everything that one needs, without mim.

What they import is imported when they are called, so that ``env`` works where frameworks do not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from ..utils.install_hints import explain
from . import environment

PROGRAM = 'python -m mmhrformer'

# Main metric of a task -> what makes it per cent.
METRICS = {'Top 1 Accuracy': 1, 'AP': 100, 'mIoU': 1}

TOOLS = {
    'demo': 'draw what a model finds in images and videos',
    'browse_dataset': 'draw what a data set gives to the model',
    'analyze_logs': 'draw the curves of training runs',
    'get_flops': 'count parameters and operations',
    'print_config': 'print a config with everything that it inherits',
    'convert_checkpoint': 'convert a checkpoint to another dialect or format',
    'export_onnx': 'export a model to ONNX',
    'benchmark': 'measure speed and memory',
}


def run_stock(tool: str) -> Callable[[list[str]], None]:
    """Make the command that runs a stock tool of the framework that a config is for."""

    def command(args: list[str]) -> None:
        from .launch import run_stock_tool

        run_stock_tool(tool, args)

    return command


def run_ours(tool: str) -> Callable[[list[str]], None]:
    """Make the command that runs a tool of ours, from the checkout or from the wheel."""

    def command(args: list[str]) -> None:
        from .launch import our_tool, run_script

        run_script(our_tool(tool), args)

    return command


def copy_whole(source: Path, folder: Path) -> Path:
    """Copy a file so that it is there completely or not at all.

    Args:
        source (Path): The file.
        folder (Path): Where to; it is made if it does not exist.

    Returns:
        Path: The copy.
    """
    from ..utils.files import whole_file

    folder.mkdir(parents=True, exist_ok=True)
    with source.open('rb') as original, whole_file(folder / source.name) as copy:
        shutil.copyfileobj(original, copy)
    return folder / source.name


def download(args: list[str]) -> None:
    """Fetch checkpoints of the zoo, and print where they are.

    Args:
        args (list[str]): The command line.
    """
    parser = argparse.ArgumentParser(
        prog=f'{PROGRAM} download',
        description='Fetch published checkpoints of the zoo, check them, and print where they are.',
        epilog=f'Example: {PROGRAM} download td-hm_hrformer-small_8xb32-210e_coco-256x192',
    )
    parser.add_argument(
        'names', nargs='+', metavar='NAME', help='as `list` prints them; NAME@official, NAME@mmpose'
    )
    parser.add_argument(
        '--dest', type=Path, metavar='DIR', help='copy them here; else they stay in the cache'
    )
    options = parser.parse_args(args)
    from ..checkpoints import fetch

    for name in options.names:
        path = fetch(name)
        print(copy_whole(path, options.dest) if options.dest else path)


def reported_results(results: list[dict]) -> str:
    """Write the main results of a model, each with who reported it.

    Args:
        results (list[dict]): As in a metafile.

    Returns:
        str: Such as ``'AP 74.0 reported by official repository'``; empty if there are none.
    """
    found = {}
    for result in results:
        for name, scale in METRICS.items():
            if name in result.get('Metrics', {}):
                value = f'{name} {result["Metrics"][name] * scale:.1f}'
                found.setdefault(result['Reported By'], value)
    return '; '.join(f'{value} reported by {who}' for who, value in found.items())


def print_models(args: list[str]) -> None:
    """Print the zoo as a table.

    Args:
        args (list[str]): The command line.
    """
    parser = argparse.ArgumentParser(
        prog=f'{PROGRAM} list',
        description='List the models of the zoo. The accuracies are those that others reported '
        'for their checkpoints; nobody has reproduced them with this code yet.',
        epilog=f"Example: {PROGRAM} list 'td-hm*'",
    )
    parser.add_argument(
        'pattern', nargs='?', default='*', help='what the names have to match (%(default)s)'
    )
    options = parser.parse_args(args)
    from ..checkpoints import list_models, read_zoo

    names, zoo = list_models(options.pattern), read_zoo()
    if not names:
        raise ValueError(f'no model of the zoo matches {options.pattern!r}: try `list` alone')
    rows = [('model', 'task', 'parameters', 'weights', 'reported, not measured here')]
    for name in names:
        model = zoo[name]
        tasks = [result['Task'] for result in model.results]
        folder = model.config.parent.name.removeprefix('hrformer_')
        parameters = f'{model.metadata["Parameters"] / 1e6:.1f} M'
        weights = ', '.join(source.origin for source in model.sources) or 'none'
        task = tasks[0] if tasks else folder
        rows.append((name, task, parameters, weights, reported_results(model.results)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int | None]]] = {
    'train': ('train a config: CONFIG [arguments of the framework]', run_stock('train')),
    'test': ('test a checkpoint: CONFIG CHECKPOINT [arguments]', run_stock('test')),
    'list': ('list the models of the zoo: [PATTERN]', print_models),
    'download': ('fetch published checkpoints: NAME ... [--dest DIR]', download),
    'env': ('print what is installed, what works, and what to install', environment.main),
    **{name: (text, run_ours(name)) for name, text in TOOLS.items()},
}


def usage() -> str:
    """The help text of the whole program."""
    lines = [f'  {name:<20} {text}' for name, (text, _) in COMMANDS.items()]
    return (
        f'usage: {PROGRAM} COMMAND [arguments]\n\ncommands:\n'
        + '\n'.join(lines)
        + f'\n\nHelp for one: {PROGRAM} COMMAND --help\nExample: {PROGRAM} list "hrformer-*"'
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
    if args[0] not in COMMANDS:
        names = ', '.join(COMMANDS)
        print(f'mmhrformer: unknown command {args[0]!r}; choose one of {names}', file=sys.stderr)
        return 2
    command = COMMANDS[args[0]][1]
    try:
        return command(args[1:]) or 0
    except ImportError as err:
        cure = explain(err)
        print(f'mmhrformer {args[0]}: {err}. {cure}', file=sys.stderr)
    except (OSError, RuntimeError, ValueError) as err:
        if args[0] not in ('list', 'download'):  # inside a tool the place tells more
            raise
        print(f'mmhrformer {args[0]}: {err}', file=sys.stderr)
    return 1

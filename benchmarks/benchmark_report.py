"""Tell where ``tools/benchmark.py`` measures and what it found."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
import re
from pathlib import Path

import torch

PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmpose', 'mmpretrain', 'mmsegmentation', 'mmhrformer')


def cpu_name() -> str:
    """The name of the processor."""
    try:
        match = re.search(r'model name\s*:\s*(.+)', Path('/proc/cpuinfo').read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or 'unknown'


def version_of(package: str) -> str | None:
    """The version of an installed package, which may come from a fork of another name."""
    for name in (package, f'{package}-lite', f'onedl-{package}'):
        try:
            return f'{importlib.metadata.version(name)}{"" if name == package else f" ({name})"}'
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def load_average() -> float:
    """How many processes were running or waiting in the last minute, on average."""
    return os.getloadavg()[0] if hasattr(os, 'getloadavg') else math.nan


def describe_environment(args: argparse.Namespace) -> dict:
    """Hardware, versions, and what decides about speed.

    Args:
        args (argparse.Namespace): The arguments.

    Returns:
        dict: The facts by name.
    """
    affinity = getattr(os, 'sched_getaffinity', None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    on_cuda = args.device == 'cuda'
    return dict(
        cpu=cpu_name(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        cores=cores,
        gpu=torch.cuda.get_device_name() if on_cuda else None,
        cuda=torch.version.cuda if on_cuda else None,
        cudnn=torch.backends.cudnn.version() if on_cuda else None,
        tf32=dict(
            convolutions=torch.backends.cudnn.allow_tf32,
            products=torch.backends.cuda.matmul.allow_tf32,
        ),
        platform=platform.platform(),
        python=platform.python_version(),
        versions={package: version_of(package) for package in PACKAGES},
        threads=args.threads,
        omp_num_threads=os.environ.get('OMP_NUM_THREADS'),
        load_average=load_average(),
    )


def print_environment(facts: dict, args: argparse.Namespace) -> None:
    """Print where it runs, and warn if others run there, too."""
    print(f'command   {args.command}')
    gpu = f'; {facts["gpu"]}, CUDA {facts["cuda"]}' if facts['gpu'] else ''
    print(f'hardware  {facts["cpu"]} ({facts["instructions"]}), {facts["cores"]} cores{gpu}')
    installed = {name: version for name, version in facts['versions'].items() if version}
    print(f'versions  {", ".join(f"{name} {v}" for name, v in installed.items())}')
    layout = 'channels-last' if args.channels_last else 'contiguous'
    how = {'fp32': '', 'cast': ' (models cast)', 'autocast': ' (autocast)'}
    how = how.get(args.dtype, how[args.precision_by])
    model = f'{args.task} {args.arch}, {args.mode}, {args.dtype}{how}, {args.device}'
    print(f'measured  {model}, {layout}, threads {args.threads}')
    load = facts['load_average']
    print(f'load      {load:.2f} (average of the last minute)')
    if load > facts['cores'] / 4:
        print(
            f'WARNING   the machine is busy: {load:.1f} processes on {facts["cores"]} cores. '
            'Trust only ratios, and those of many rounds'
        )
    for name, reason in args.unavailable.items():
        print(f'left out  {name}: {reason}')
    print(flush=True)


def megabytes(value: int | None) -> str:
    """Bytes in millions."""
    return '' if value is None else f'{value / 1e6:.1f}'


def table_of(rows: list[dict], args: argparse.Namespace) -> list[list[str]]:
    """Lines of the table, the head first.

    Args:
        rows (list[dict]): What :func:`measure` or :func:`measure_startup` found.
        args (argparse.Namespace): The arguments.

    Returns:
        list[list[str]]: The cells.
    """
    baselines = {(r['case'], r['threads']): r for r in rows if r['candidate'] == args.baseline}
    lines = []
    for row in rows:
        base = baselines.get((row['case'], row['threads']), {})
        cells = {
            'case': row['case'],
            'threads': str(row['threads']),
            'candidate': row['candidate'],
            'ms': f'{row["median"] * 1e3:.1f}',
            'quartiles': f'{row["q1"] * 1e3:.1f}-{row["q3"] * 1e3:.1f}',
            'images/s': f'{row["images_per_second"]:.1f}' if 'images_per_second' in row else '',
            'speed-up': f'{row["speedup"]:.2f}x',
            'by rounds (quartiles)': f'{row["round_speedup"]:.2f}x '
            f'({row["round_speedup_q1"]:.2f}-{row["round_speedup_q3"]:.2f})',
        }
        if len(args.cases) > 1 and 'growth' in row:
            cells['growth'] = f'{row["growth"]:.2f}x'
        cells.update(memory_cells(row, base))
        cells.update(profile_cells(row))
        lines = lines or [list(cells)]
        lines.append([cells.get(title, '') for title in lines[0]])
    return lines


def memory_cells(row: dict, base: dict) -> dict[str, str]:
    """The cells about memory, where it was measured, with ratios to the baseline."""
    cells = {}
    for key, title in (('saved', 'saved MB'), ('peak', 'peak MB')):
        if key in row:
            ratio = f' ({row[key] / base[key]:.2f}x)' if row[key] and base.get(key) else ''
            cells[title] = megabytes(row[key]) + ratio
    return cells


def profile_cells(row: dict) -> dict[str, str]:
    """The cells about operators, where they were counted."""
    if 'profile' not in row:
        return {}
    counts = row['profile']
    cells = {'operators': str(counts['operators']), 'kernels': str(counts['kernels'])}
    if counts['launches'] is not None:
        cells['launches'] = str(counts['launches'])
    return {**cells, 'allocated MB': megabytes(counts['allocated'])}


def format_table(lines: list[list[str]], markdown: bool) -> str:
    """Align a table.

    Args:
        lines (list[list[str]]): The cells, the head first.
        markdown (bool): Whether to write it as Markdown.

    Returns:
        str: The table.
    """
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    if not markdown:
        return '\n'.join('  '.join(line).rstrip() for line in padded)
    padded.insert(1, ['-' * width for width in widths])
    return '\n'.join(f'| {" | ".join(line)} |' for line in padded)


def print_results(rows: list[dict], args: argparse.Namespace) -> None:
    """Print the table, and what takes the time if that was asked for."""
    print(format_table(table_of(rows, args), args.table))
    baseline = 'mmpose' if args.startup else args.baseline
    print(f'\nspeed-up: against {baseline}, more is faster')
    if any('peak' in row for row in rows):
        rough = 'rough: growth of the process' if args.device == 'cpu' else 'weights not counted'
        print(f'peak: of one step over what was in use before ({rough})')
    for row in rows if args.profile else ():
        print(f'\n{row["candidate"]}, {row["case"]}: share of the time, calls')
        for top in row['profile']['top']:
            print(f'  {top["share"]:6.1%}  {top["calls"]:6d}  {top["name"][:70]}')

"""Report of ``tools/benchmark.py``: the environment and the results."""

from __future__ import annotations

import argparse
import os
import platform
import re
from pathlib import Path

import torch

from mmhrformer.utils.install_hints import installed


def cpu_name() -> str:
    """The name of the processor."""
    file = Path('/proc/cpuinfo')
    match = file.is_file() and re.search(r'model name\s*:\s*(.+)', file.read_text())
    return match[1] if match else platform.processor() or 'unknown'


def load_average() -> float:
    """Average number of running or waiting processes in the last minute."""
    return os.getloadavg()[0] if hasattr(os, 'getloadavg') else float('nan')


def describe_environment(args: argparse.Namespace) -> dict:
    """Hardware, versions, and settings that affect speed, by name."""
    affinity = getattr(os, 'sched_getaffinity', None)
    on_cuda = args.device == 'cuda'
    return dict(
        cpu=cpu_name(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        cores=len(affinity(0)) if affinity else os.cpu_count(),
        gpu=torch.cuda.get_device_name() if on_cuda else None,
        cuda=torch.version.cuda if on_cuda else None,
        cudnn=torch.backends.cudnn.version() if on_cuda else None,
        tf32=dict(
            convolutions=torch.backends.cudnn.allow_tf32,
            products=torch.backends.cuda.matmul.allow_tf32,
        ),
        platform=platform.platform(),
        python=platform.python_version(),
        versions=installed(),
        threads=args.threads,
        omp_num_threads=os.environ.get('OMP_NUM_THREADS'),
        load_average=load_average(),
    )


def print_environment(facts: dict, args: argparse.Namespace) -> None:
    """Print the environment, and warn if the machine is busy."""
    print(f'command   {args.command}')
    gpu = f'; {facts["gpu"]}, CUDA {facts["cuda"]}' if facts['gpu'] else ''
    print(f'hardware  {facts["cpu"]} ({facts["instructions"]}), {facts["cores"]} cores{gpu}')
    versions = (f'{k} {v}' for k, v in facts['versions'].items() if 'mm' in k or k == 'torch')
    print(f'versions  {", ".join(versions)}')
    how = 'autocast' if args.mode == 'train' else 'models cast'
    dtype = args.dtype if args.dtype == 'fp32' else f'{args.dtype} ({how})'
    layout = 'channels-last' if args.channels_last else 'contiguous'
    model = f'{args.task} {args.arch}, {args.mode}, {dtype}, {args.device}, {layout}'
    print(f'measured  {model}, threads {args.threads}')
    load = facts['load_average']
    print(f'load      {load:.2f} (average of the last minute)')
    if load > facts['cores'] / 4:
        print(
            f'WARNING   the machine is busy: {load:.1f} processes on {facts["cores"]} cores. '
            'Only ratios over many rounds are reliable'
        )
    print(flush=True)


def cells_of(row: dict, base: dict, growth: bool) -> dict[str, str]:
    """The cells of a row of the table by title, with memory ratios to the baseline."""
    low, high = row['round_speedup_q1'], row['round_speedup_q3']
    cells = {
        'case': row['case'],
        'candidate': row['candidate'],
        'ms': f'{row["median"] * 1e3:.1f}',
        'quartiles': f'{row["q1"] * 1e3:.1f}-{row["q3"] * 1e3:.1f}',
        **({'images/s': f'{row["images_per_second"]:.1f}'} if 'images_per_second' in row else {}),
        'speed-up': f'{row["speedup"]:.2f}x',
        'by rounds (quartiles)': f'{row["round_speedup"]:.2f}x ({low:.2f}-{high:.2f})',
    }
    if growth:
        cells['growth'] = f'{row["growth"]:.2f}x'
    for key in ('saved', 'peak'):
        if row.get(key) is not None:
            ratio = f' ({row[key] / base[key]:.2f}x)' if base.get(key) else ''
            cells[f'{key} MB'] = f'{row[key] / 1e6:.1f}{ratio}'
    for key in ('operators', 'kernels', 'launches'):
        if row.get('profile', {}).get(key) is not None:
            cells[key] = str(row['profile'][key])
    if 'profile' in row:
        cells['allocated MB'] = f'{row["profile"]["allocated"] / 1e6:.1f}'
    return cells


def format_table(rows: list[dict], args: argparse.Namespace) -> str:
    """The results as an aligned table, with ``--table`` in Markdown."""
    baselines = {row['case']: row for row in rows if row['candidate'] == args.baseline}
    growth = len(args.cases) > 1 and not args.startup
    found = [cells_of(row, baselines.get(row['case'], {}), growth) for row in rows]
    titles = list(dict.fromkeys(title for cells in found for title in cells))
    lines = [titles, *([cells.get(title, '') for title in titles] for cells in found)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    if not args.table:
        return '\n'.join('  '.join(line).rstrip() for line in padded)
    padded.insert(1, ['-' * width for width in widths])
    return '\n'.join(f'| {" | ".join(line)} |' for line in padded)


def print_results(rows: list[dict], args: argparse.Namespace) -> None:
    """Print the table, and the slowest operators if profiled."""
    print(format_table(rows, args))
    baseline = 'mmpose' if args.startup else args.baseline
    print(f'\nspeed-up: relative to {baseline}, higher is faster')
    if any('peak' in row for row in rows):
        print('peak: memory allocated by torch in one step, relative to before the step')
    for row in rows if args.profile and not args.startup else ():
        print(f'\n{row["candidate"]}, {row["case"]}: share of the time, calls')
        for top in row['profile']['top']:
            print(f'  {top["share"]:6.1%}  {top["calls"]:6d}  {top["name"][:70]}')

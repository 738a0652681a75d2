"""Print the results of gpu_check.py as Markdown tables.

python benchmarks/gpu_table.py benchmarks/results/FILE.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

NAMES = {'hrnet-w32': 'HRNet-W32', 'hrnet-w48': 'HRNet-W48', 'vit-s': 'ViT-S', 'vit-b': 'ViT-B'}
BACKENDS = {'cuda': 'torch', 'kernels': 'Triton'}
HOWS = {
    'eager': 'eager',
    'graph': 'CUDA graph',
    'hook': 'CUDAGraphHook',
    'compiled': 'compiled, CUDA graph',
}
# Number of kernels of a sweep or a profile to print.
FEW = 12


def title(row: dict) -> str:
    """The name of a candidate, without how it is run."""
    if not row['arch']:
        return NAMES.get(row['base'], row['base'])
    model = f'HRFormer-{row["arch"][0].upper()}'
    if row['base'].startswith('mmpose'):
        return f'{model}, mmpose' + ', channels-last' * (row['base'] == 'mmpose')
    backend = BACKENDS.get(row['backend'], row['backend'])
    folded, padded = 'fused' in row['base'], 'padded' in row['base']
    return f'{model}, {backend}' + ', folded' * folded + ', padded' * padded


def markdown(head: list[str], lines: Iterable[list]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    rows = [head, ['---', *['---:'] * (len(head) - 1)], *lines]
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in rows)


def ratio(row: dict | None, peer: dict | None) -> str:
    """Speed-up of a candidate over a peer: the median over the rounds, if known."""
    if row is None or peer is None:
        return ''
    if 'rounds' not in row or 'rounds' not in peer:
        return f'{peer["ms"] / row["ms"]:.2f}'
    return f'{statistics.median(b / a for a, b in zip(row["rounds"], peer["rounds"])):.2f}'


def times_table(rows: list[dict]) -> str:
    """Times of a table, and each candidate's best time relative to the best of its peers."""
    memory = {title(row): row['peak_mb'] for row in rows if row.get('peak_mb') is not None}
    models: dict[str, dict[str, dict]] = {name: {} for name in memory}  # some may have no times
    for row in rows:
        if 'ms' in row:
            models.setdefault(title(row), {})[row['how']] = row
    best = {name: min(x.values(), key=lambda row: row['ms']) for name, x in models.items() if x}
    names = dict.fromkeys([*HOWS, *(how for found in models.values() for how in found)])
    hows = [how for how in names if any(how in found for found in models.values())]
    peers = [name for name in best if name in NAMES.values()]
    head = ['model', *(f'{HOWS.get(how, how)}, ms' for how in hows), 'images/s', 'peak, MB']
    head += ['against mmpose', *(f'against {name}' for name in peers)]
    lines = []
    for name, found in models.items():
        top = best.get(name)
        ms = [f'{found[how]["ms"]:.2f}' if how in found else '' for how in hows]
        original = best.get(f'{name.split(",")[0]}, mmpose')
        ratios = [ratio(top, peer) for peer in (original, *map(best.get, peers))]
        images = f'{top["images_s"]:.0f}' if top else ''
        lines.append([name, *ms, images, memory.get(name, ''), *ratios])
    used = [i for i in range(len(head)) if any(line[i] != '' for line in lines)]
    return markdown([head[i] for i in used], [[line[i] for i in used] for line in lines])


def sweep_table(rows: list[dict]) -> str:
    """The fastest options of each kernel for each shape, compared with torch."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if 'us' in row:
            groups.setdefault((row['kernel'], row['shape']), []).append(row)
    lines = []
    for (kernel, shape), found in groups.items():
        plain = [row['us'] for row in found if row['option'] == 'torch']
        found = sorted((row for row in found if row['option'] != 'torch'), key=lambda r: r['us'])
        options = '; '.join(f'{row["option"]} {row["us"]:.1f}' for row in found[:3])
        fastest = [f'{found[0]["us"]:.1f}', f'{found[0]["tb_s"]:.2f}'] if found else ['', '']
        lines.append([kernel, shape, *fastest, *(plain or ['']), options])
    return markdown(['kernel', 'shape', 'µs', 'TB/s', 'torch, µs', 'fastest options, µs'], lines)


def profile_tables(rows: list[dict]) -> str:
    """The kernels of each candidate."""
    parts = []
    for row in rows:
        if 'top' in row:
            lines = [
                [f'`{top["name"][:80]}`', f'{100 * top["share"]:.1f}', top['calls']]
                for top in row['top'][:FEW]
            ]
            facts = f'{row["kernels"]} kernels, {row["launches"]} launches'
            parts.append(f'{title(row)}, {row["mode"]}, batch {row["batch"]}: {facts}\n')
            parts.append(markdown(['kernel', 'share, %', 'calls'], lines) + '\n')
    return '\n'.join(parts)


def facts_list(rows: list[dict]) -> str:
    """A list of facts, one row per line."""
    skip = ('section', 'table', 'at', 'what')
    lines = []
    for row in rows:
        facts = {key: value for key, value in row.items() if key not in skip}
        facts = {k: f'{v:.4g}' if isinstance(v, float) else v for k, v in facts.items()}
        lines.append('- ' + ', '.join(f'{key} {value}' for key, value in facts.items()))
    return '\n'.join(lines)


def has_failed(row: dict) -> bool:
    """Whether a row reports a failure, as text; numeric errors are differences."""
    return isinstance(row.get('error'), str) and row['error'] != ''


def render(data: dict) -> str:
    """All tables of a results file of gpu_check.py."""
    renderers = dict(kernels=sweep_table, profile=profile_tables, env=facts_list, parity=facts_list)
    tables: dict[str, list[dict]] = {}
    for row in data['rows']:
        if row['section'] != 'run':
            tables.setdefault(row['table'], []).append(row)
    parts = [f'# {data["card"]}, {data["started"]}, commit: {data["commit"]}']
    parts += [f'`{data["command"]}`'] if 'command' in data else []
    remarks = ('method', 'code', 'incomplete')  # in files of published runs, by hand
    parts += [f'{name.capitalize()}: {data[name]}' for name in remarks if name in data]
    for name, rows in tables.items():
        parts.append(f'## {name}\n\n{renderers.get(rows[0]["section"], times_table)(rows)}')
    failed = [row for row in data['rows'] if row.get('code') or has_failed(row)]
    parts += [f'## Failed\n\n{facts_list(failed)}'] if failed else []
    return '\n\n'.join(parts)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('file', type=Path, help='results file of gpu_check.py')
    print(render(json.loads(parser.parse_args().file.read_text())))

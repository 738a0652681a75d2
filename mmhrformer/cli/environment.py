"""The report of ``python -m mmhrformer env`` on installed packages, features and fixes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from ..utils.install_hints import NAMES, OWNERS, how_to_install, installed, problems, suggest_fix
from ..version import __version__
from . import checks
from .checks import START

# Feature -> its checks: modules to import, and functions to call after them, as MODULE:FUNCTION.
# They run in other processes, of which cli/checks.py is __main__.
FEATURES = {
    'core': '__main__:run_model',
    'operators': 'mmhrformer.ops.dispatch:describe',
    'package configs': '__main__:find_package',
    'mmcv operators': 'mmcv.ops __main__:run_nms',
    'classification': 'mmpretrain.models mmpretrain.datasets',
    'pose': 'mmpose.models mmpose.datasets mmpose.evaluation mmdet xtcocotools',
    'segmentation': 'mmseg.models mmseg.datasets mmhrformer.models.ocr_head',
    'detector boxes': 'mmdet.apis mmdet.models',
    'export': 'onnx onnxruntime',
    'safetensors': 'safetensors.torch',
    'mim': 'mim',
}


def try_features(features: dict[str, str]) -> list[dict]:
    """Run the checks of features in other processes with the same module search path.

    A process runs until a check fails. The remaining features are tried in a new one, since
    partially imported modules make later imports fail for other reasons.

    Args:
        features (dict[str, str]): Checks by name, as in :data:`FEATURES`.

    Returns:
        list[dict]: For each feature ``name``, ``works``, ``says`` (its report or error), and
        ``fix`` (empty if it works, or none is known).
    """
    results, left = {}, {}
    for name, feature_checks in features.items():
        modules = [check.partition('.')[0] for check in feature_checks.split() if ':' not in check]
        missing = [m for m in dict.fromkeys(modules) if importlib.util.find_spec(m) is None]
        if missing:
            says = f'not installed: {", ".join(missing)}'
            results[name] = (False, says, how_to_install(missing[0]))
        else:
            left[name] = feature_checks
    while left:
        reports, failure = _run_until_failure([*left.values()])
        for name, says in zip([*left], reports):
            results[name] = (True, says, '')
            del left[name]
        if left:
            name = next(iter(left))
            results[name] = (False, *failure)
            del left[name]
    return [
        dict(zip(('name', 'works', 'says', 'fix'), (name, *results[name]))) for name in features
    ]


def _run_until_failure(features: list[str]) -> tuple[list[str], tuple[str, str]]:
    """Reports of the features that work; error and fix of the first one that does not."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, '-W', 'ignore', checks.__file__, *features]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    reports = [text.partition('\n')[0] for text in done.stdout.split(START)[1:]]
    output = done.stderr.rpartition(START)[2].strip()
    # A message may have several lines; it begins at the last line that names an error.
    errors = [line for line in output.splitlines() if re.match(r'[\w.]+(Error|Exception)\b', line)]
    error = errors[-1] if errors else output[-300:]
    if done.returncode < 0:
        error = f'killed by signal {-done.returncode}'
    return reports, (error, suggest_fix(output))


def has_operators() -> bool:
    """Whether the installed mmcv has operators, possibly built for another torch."""
    spec = importlib.util.find_spec('mmcv')
    folders = spec.submodule_search_locations if spec else None
    return any(any(Path(folder).glob('_ext*')) for folder in folders or ())


def collect() -> dict:
    """Collect the report.

    Returns:
        dict: ``mmhrformer``, ``python``, ``platform``, ``packages``, ``mmcv_has_operators``,
        ``features`` and ``problems``.
    """
    versions = installed()
    return dict(
        mmhrformer=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=versions,
        mmcv_has_operators=has_operators(),
        features=try_features(FEATURES),
        problems=[dict(problem=problem, fix=fix) for problem, fix in problems(versions)],
    )


def format_report(report: dict) -> str:
    """Format a report as text.

    Args:
        report (dict): As :func:`collect` returns it.

    Returns:
        str: The text.
    """
    lines = [
        f'mmhrformer {report["mmhrformer"]}, Python {report["python"]}, {report["platform"]}',
        '\nInstalled',
    ]
    operators = ' with operators' if report['mmcv_has_operators'] else ' without operators'
    for name, version in report['packages'].items():
        lines.append(f'  {name:<22} {version}{operators if name in OWNERS["mmcv"] else ""}')
    absent = [name for name in NAMES if name not in report['packages']]
    lines += [f'  not installed: {", ".join(absent) or "nothing"}', '\nWorks']
    shown = set()
    for feature in report['features']:
        works = 'yes' if feature['works'] else 'NO '
        lines.append(f'  {feature["name"]:<22} {works}  {feature["says"]}'.rstrip())
        if fix := feature['fix']:
            lines.append(f'    Fix: {"as above" if fix in shown else fix}')
            shown.add(fix)
    if report['problems']:
        lines.append('\nProblems')
    for problem in report['problems']:
        lines += [f'  {problem["problem"]}', f'    Fix: {problem["fix"]}']
    return '\n'.join(lines)


def main(args: list[str] | None = None) -> int:
    """Print the report.

    Args:
        args (list[str], optional): The arguments. Defaults to those of the process.

    Returns:
        int: The exit status: 0 if at least the backbone works, else 1.
    """
    parser = argparse.ArgumentParser(
        prog='python -m mmhrformer env',
        description='Print the installed packages, which features work, and how to fix those '
        'that do not. The exit status is 0 if at least the backbone works.',
        epilog='Example: python -m mmhrformer env --json',
    )
    parser.add_argument('--json', action='store_true', help='print the report as JSON')
    options = parser.parse_args(args)
    report = collect()
    print(json.dumps(report, indent=1) if options.json else format_report(report))
    return 0 if report['features'][0]['works'] else 1

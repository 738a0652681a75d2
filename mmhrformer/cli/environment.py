"""The report of ``python -m mmhrformer env``: what is installed, what works, what to install.

Whether a part works is found out by importing it in another process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..utils.install_hints import NAMES, OWNERS, cure_of, how_to_install, installed, problems
from ..version import __version__

# Small enough to be built and run in a moment.
RUN_CORE = """
import torch
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
says = f'torch for CUDA {torch.version.cuda}' if torch.version.cuda else 'torch for CPU'
says += f', {gpus} GPU' + 's' * (gpus > 1) if gpus else ', no GPU'
from mmhrformer import HRFormer
arch = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
HRFormer(arch=arch).eval()(torch.rand(1, 3, 64, 64))
"""

# Triton compiles a kernel, where it can.
RUN_FORMS = """
from mmhrformer.ops.dispatch import describe
says = describe()
"""

# Called and not only imported: there are stand-ins for mmcv._ext that let the frameworks import.
RUN_OPERATOR = """
import torch
from mmcv.ops import nms
nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
"""

# Runs the code of one feature after the other, since they share slow imports, until one fails.
START = '\x1e'  # before each, so that what it said can be told from what the others said
RUN_ALL = f"""
import json, sys
for name, code in json.loads(sys.argv[1]):
    print({START!r}, file=sys.stderr, flush=True)
    scope = {{}}
    exec(code, scope)
    print({START!r} + json.dumps(scope.get('says', '')), flush=True)
"""


@dataclass(frozen=True)
class Feature:
    """Something that works or not with what is installed.

    Attributes:
        name (str): What it is called in the report.
        modules (tuple[str, ...]): The top-level modules that it cannot do without.
        code (str): What a process has to be able to run; it may leave a text to report in ``says``.
    """

    name: str
    modules: tuple[str, ...]
    code: str


FEATURES = (
    Feature('core', ('torch', 'numpy', 'mmengine', 'mmcv'), RUN_CORE),
    Feature('operators', ('torch', 'numpy', 'mmengine', 'mmcv'), RUN_FORMS),
    Feature('mmcv operators', ('mmcv',), RUN_OPERATOR),
    Feature('classification', ('mmpretrain',), 'import mmpretrain.models, mmpretrain.datasets'),
    Feature(
        'pose',
        ('mmpose', 'mmdet', 'xtcocotools'),
        'import mmpose.models, mmpose.datasets, mmpose.evaluation',
    ),
    Feature(
        'segmentation',
        ('mmseg',),
        'import mmseg.models, mmseg.datasets; from mmhrformer import OCRHead',
    ),
    Feature('detector boxes', ('mmdet',), 'import mmdet.apis, mmdet.models'),
    Feature('export', ('onnx', 'onnxruntime'), 'import onnx, onnxruntime'),
    Feature('safetensors', ('safetensors',), 'import safetensors.torch'),
    Feature('mim', ('mim',), 'import mim'),
)


@dataclass(frozen=True)
class Result:
    """Whether a feature works.

    Attributes:
        name (str): The feature.
        works (bool): Whether its code ran.
        says (str): What the code has to report, or the error.
        cure (str): What to do if it does not work; empty if nothing is known.
    """

    name: str
    works: bool
    says: str
    cure: str


def try_features(features: Sequence[Feature]) -> list[Result]:
    """Run the code of features in other processes, which find modules where this one does.

    One process goes on until something fails. What is left is tried in a new one, since modules
    that are half imported make the next import fail for another reason.

    Args:
        features (Sequence[Feature]): What to try.

    Returns:
        list[Result]: Whether each works, and if not, why.
    """
    results = {}
    for feature in features:
        missing = [name for name in feature.modules if importlib.util.find_spec(name) is None]
        if missing:
            says, cure = f'not installed: {", ".join(missing)}', how_to_install(missing[0])
            results[feature.name] = Result(feature.name, False, says, cure)
    left = [feature for feature in features if feature.name not in results]
    while left:
        worked, failure = run_until_failure(left)
        for feature, says in zip(left, worked):
            results[feature.name] = Result(feature.name, True, says, '')
        if len(worked) < len(left):
            name = left[len(worked)].name
            results[name] = Result(name, False, *failure)
        left = left[len(worked) + 1 :]
    return [results[feature.name] for feature in features]


def run_until_failure(features: Sequence[Feature]) -> tuple[list[str], tuple[str, str]]:
    """Run the code of features in one process, until that of one fails.

    Args:
        features (Sequence[Feature]): What to try.

    Returns:
        tuple: What each that worked has to report; and the error and cure of the one that did not.
    """
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    code = json.dumps([(feature.name, feature.code) for feature in features])
    command = [sys.executable, '-W', 'ignore', '-c', RUN_ALL, code]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    worked = [json.loads(text.splitlines()[0]) for text in done.stdout.split(START)[1:]]
    said = done.stderr.rpartition(START)[2].strip()
    # A message may have several lines; the last that names an error begins it.
    errors = [line for line in said.splitlines() if re.match(r'[\w.]+(Error|Exception)\b', line)]
    if done.returncode < 0:
        return worked, (f'was ended by signal {-done.returncode}', cure_of(said))
    return worked, (errors[-1] if errors else said[-300:], cure_of(said))


def has_operators() -> bool:
    """Whether the mmcv that would be imported was built with operators.

    Returns:
        bool: Whether there is the file; it may have been built for another torch.
    """
    spec = importlib.util.find_spec('mmcv')
    folders = spec.submodule_search_locations if spec else None
    return any(any(Path(folder).glob('_ext*')) for folder in folders or ())


def collect() -> dict:
    """Look at everything.

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
        features=[asdict(result) for result in try_features(FEATURES)],
        problems=[dict(problem=what, cure=cure) for what, cure in problems(versions)],
    )


def format_report(report: dict) -> str:
    """Write a report for people.

    Args:
        report (dict): As :func:`collect` returns it.

    Returns:
        str: Its lines.
    """
    operators = 'with' if report['mmcv_has_operators'] else 'without'
    lines = [
        f'mmhrformer {report["mmhrformer"]}, Python {report["python"]}, {report["platform"]}',
        '\nInstalled',
    ]
    for name, version in report['packages'].items():
        note = f' {operators} operators' if name in OWNERS['mmcv'] else ''
        lines.append(f'  {name:<22} {version}{note}')
    absent = [name for name in NAMES if name not in report['packages']]
    lines.append(f'  not installed: {", ".join(absent) or "nothing"}')
    lines.append('\nWorks')
    told = set()
    for feature in report['features']:
        works = 'yes' if feature['works'] else 'NO '
        lines.append(f'  {feature["name"]:<22} {works}  {feature["says"]}'.rstrip())
        if feature['cure']:
            again = feature['cure'] in told
            lines.append(f'    to install or mend: {"as above" if again else feature["cure"]}')
            told.add(feature['cure'])
    if report['problems']:
        lines.append('\nProblems')
    for problem in report['problems']:
        lines += [f'  {problem["problem"]}', f'    to mend: {problem["cure"]}']
    return '\n'.join(lines)


def main(args: list[str] | None = None) -> int:
    """Print the report.

    Args:
        args (list[str], optional): The command line. Defaults to that of the process.

    Returns:
        int: 0 if at least the core works, else 1.
    """
    parser = argparse.ArgumentParser(
        prog='python -m mmhrformer env',
        description='Print what is installed, what works with it, and what to install for the '
        'rest. Exits with 0 if at least the backbone works.',
        epilog='Example: python -m mmhrformer env --json',
    )
    parser.add_argument('--json', action='store_true', help='print it for machines')
    options = parser.parse_args(args)
    report = collect()
    print(json.dumps(report, indent=1) if options.json else format_report(report))
    return 0 if report['features'][0]['works'] else 1

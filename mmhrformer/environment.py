"""What is installed, what works with it, and what to install for the rest.

OpenMMLab's packages exist twice: the stock ones, whose last releases are of 2023 to 2025, and
maintained forks of some, called ``onedl-...``, with the same import names. This module needs
nothing but the standard library: it tells what is wrong where torch or mmcv cannot be imported.
Whether another part works is found out by importing it in another process.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from .version import __version__

# Import name -> the distributions that bring it. They write the same files.
OWNERS = {
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'mmcv-full', 'onedl-mmcv'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
    'mmpose': ('mmpose',),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
}
OTHERS = (
    'torch', 'torchvision', 'numpy', 'xtcocotools', 'transformers', 'safetensors', 'onnx',
    'onnxruntime', 'setuptools', 'openmim', 'onedl-mim',
)  # fmt: skip

NAMES = (*OTHERS, *(name for owners in OWNERS.values() for name in owners))

# The oldest versions that the extras of this package accept.
MINIMUM = {
    'torch': '2.1', 'mmengine': '0.10.3', 'mmcv': '2.0.1', 'mmcv-lite': '2.0.1',
    'mmpretrain': '1.0', 'mmpose': '1.0', 'mmdet': '3.0', 'mmsegmentation': '1.0',
}  # fmt: skip

BUILD_MMCV = (
    'pip uninstall -y mmcv mmcv-lite && pip install "setuptools<81" wheel ninja psutil && '
    'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir --no-binary mmcv mmcv==2.1.0'
)
FORKS = 'or, of the maintained forks: pip install'
CORE = f"pip install 'mmhrformer[core]'; {FORKS} onedl-mmengine onedl-mmcv"

OLDER_TRANSFORMERS = (
    "pip install 'transformers>=4.28,<4.56', or, where nothing else needs it, pip uninstall -y "
    'transformers: nothing here uses it'
)

BUILD_FORK = (
    'pip install "setuptools<81" wheel ninja psutil && MMCV_WITH_OPS=1 pip install --no-deps '
    '--force-reinstall --no-build-isolation --no-cache-dir --no-binary onedl-mmcv onedl-mmcv'
)

# Import name -> how to install it, of either family.
INSTALL = {
    'torch': 'pip install torch torchvision',
    'torchvision': 'pip install torchvision, in the version that belongs to your torch',
    'numpy': 'pip install numpy',
    'mmengine': CORE,
    'mmcv': CORE,
    'mmpretrain': (
        f"pip install 'mmhrformer[cls]'; {FORKS} onedl-mmengine onedl-mmcv onedl-mmpretrain"
    ),
    'mmpose': (
        "pip install --no-build-isolation chumpy && pip install 'mmhrformer[pose]' (it has no "
        f'maintained fork), and mmcv with its operators: {BUILD_MMCV}'
    ),
    'mmseg': (
        f"pip install 'mmhrformer[seg]', and mmcv with its operators: {BUILD_MMCV}; {FORKS} "
        'onedl-mmengine onedl-mmcv onedl-mmsegmentation'
    ),
    'mmdet': f"pip install 'mmdet>=3.0,<3.4'; {FORKS} onedl-mmdetection",
    'xtcocotools': 'pip install xtcocotools',
    'ftfy': 'pip install ftfy regex',
    'regex': 'pip install ftfy regex',
    'seaborn': 'pip install seaborn',
    'safetensors': 'pip install safetensors',
    'onnx': 'pip install onnx onnxruntime onnxslim',
    'onnxruntime': 'pip install onnx onnxruntime onnxslim',
    'onnxslim': 'pip install onnx onnxruntime onnxslim',
    'mim': (
        'nothing: python -m mmhrformer does without. If you want it: '
        'pip install openmim "setuptools<81", or pip install onedl-mim'
    ),
}

# The same where the forks are installed: a stock package would be written over them.
INSTALL_FORKS = {
    'mmengine': 'pip install onedl-mmengine',
    'mmcv': 'pip install onedl-mmcv',
    'mmpretrain': 'pip install onedl-mmpretrain',
    'mmpose': (
        'mmpose has no maintained fork, and the stock packages that it needs would be written over '
        'the forks that are here: make an environment of its own (docs/support.md)'
    ),
    'mmseg': 'pip install onedl-mmsegmentation ftfy regex',
    'mmdet': 'pip install onedl-mmdetection',
}

# The frameworks import these, and not all of them say so.
SAME_NAME = (
    'addict', 'einops', 'importlib_metadata', 'json_tricks', 'matplotlib', 'modelindex', 'munkres',
    'packaging', 'prettytable', 'pycocotools', 'rich', 'scipy', 'shapely', 'termcolor',
    'terminaltables', 'tqdm', 'yapf',
)  # fmt: skip
OTHER_NAME = {'cv2': 'opencv-python', 'PIL': 'pillow', 'yaml': 'pyyaml'}
for _module, _name in [*zip(SAME_NAME, SAME_NAME), *OTHER_NAME.items()]:
    INSTALL[_module] = f'pip install {_name}'

# What an error says -> what is wrong, and the cure. The first that fits counts.
CURES = (
    (
        r'mmcv\S*_ext\S*: undefined symbol|lib(c10|torch|cudart)\S*: cannot open shared object',
        f'this mmcv was built for another torch. Build it for this one: {BUILD_MMCV}',
    ),
    (
        r"No module named 'mmcv\._ext'",
        f'this mmcv has no operators (it may be mmcv-lite). Build one that has: {BUILD_MMCV}',
    ),
    (
        r'(?s)xtcocotools.*(numpy\.dtype size changed|_ARRAY_API not found|NumPy 1\.x cannot)',
        'xtcocotools was built for NumPy 1. Build it for yours: pip install cython "setuptools<81" '
        '&& pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir '
        '--no-binary xtcocotools xtcocotools; or go back: pip install "numpy<2"',
    ),
    (
        r"transformers[\w.]*' \(|No module named 'transformers\.|module 'transformers",
        'mmpretrain 1.2 imports names that newer transformers have no longer, and mmsegmentation '
        f'and mmdet import mmpretrain: {OLDER_TRANSFORMERS}',
    ),
    (
        r'[Cc]ould not determine (the )?home directory',
        'a library of the core wants a home: set HOME to a folder that can be written to, such as '
        'HOME=/tmp',
    ),
    (
        r'Numpy is not available',
        'this torch was built for NumPy 1: pip install "numpy<2", or torch 2.3 or newer',
    ),
    (
        r"FormatCode\(\) got an unexpected keyword argument 'verify'",
        "this mmengine is older than its yapf: pip install -U 'mmengine>=0.10.3'",
    ),
    (
        r'numpy\.dtype size changed|_ARRAY_API not found|NumPy 1\.x cannot'
        r'|numpy\.core\.multiarray failed to import',
        'a package was built for NumPy 1: install its newest version, or pip install "numpy<2"',
    ),
    (
        r'MMCV==\S+ is used but incompatible',
        'mmpose 1.3, mmdet 3.3 and mmsegmentation 1.2 accept mmcv 2.0.1 to 2.1.0 only: '
        f'{BUILD_MMCV}; or, for all but pose, use the maintained forks, which accept newer ones',
    ),
    (
        r'MMEngine==\S+ is used but incompatible',
        "pip install 'mmengine>=0.10.3,<1.0'",
    ),
    (
        r"No module named 'pkg_resources'",
        'setuptools 82 has no pkg_resources any more: pip install "setuptools<81"',
    ),
    (
        r'operator torchvision::nms does not exist|torchvision\S*: undefined symbol',
        'this torchvision was built for another torch: pip install --force-reinstall --no-deps '
        'torchvision, in the version that belongs to your torch',
    ),
)  # fmt: skip

# What is too new: package, first version that does not fit, beside which package, the cure.
TOO_NEW = (
    ('transformers', '4.56', 'mmpretrain', OLDER_TRANSFORMERS),
    ('setuptools', '82', 'openmim', 'pip install "setuptools<81"'),
    ('mmcv', '2.2', 'mmsegmentation', BUILD_MMCV),
    ('mmcv', '2.2', 'mmdet', BUILD_MMCV),
)

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


def installed(names: Iterable[str] = NAMES) -> dict[str, str]:
    """Look up the versions of packages.

    Args:
        names (Iterable[str]): Names of distributions. Defaults to those that matter here.

    Returns:
        dict[str, str]: Versions by name of the distribution, of those that are installed.

    Examples:
        >>> 'torch' in installed()
        True
    """
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def has_forks() -> bool:
    """Whether maintained forks are installed."""
    return bool(installed(name for name in NAMES if name.startswith('onedl-mm')))


def how_to_install(module: str) -> str:
    """Tell how to install a package, of the family that is installed already.

    Args:
        module (str): Its import name.

    Returns:
        str: Commands; empty if nothing is known.

    Examples:
        >>> how_to_install('safetensors')
        'pip install safetensors'
    """
    return {**INSTALL, **(INSTALL_FORKS if has_forks() else {})}.get(module, '')


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare it.

    Args:
        version (str): Such as ``'2.1.2+cu121'``.

    Returns:
        tuple[int, ...]: Such as ``(2, 1, 2)``.

    Examples:
        >>> release('2.13.0+cpu') > release('2.2rc1')
        True
    """
    return tuple(map(int, re.findall(r'\d+', re.split(r'[^\d.]', version)[0])))


def too_old(versions: dict[str, str]) -> list[tuple[str, str]]:
    """Find packages that are older than this one needs.

    Args:
        versions (dict[str, str]): As :func:`installed` returns them.

    Returns:
        list[tuple[str, str]]: What is wrong, and the cure, for each.
    """
    return [
        (
            f'{name} {versions[name]} is too old, {oldest} is the oldest that works',
            f"pip install -U '{name}>={oldest}'",
        )
        for name, oldest in MINIMUM.items()
        if name in versions and release(versions[name]) < release(oldest)
    ]


def too_new(versions: dict[str, str]) -> list[tuple[str, str]]:
    """Find packages that are newer than what is installed beside them can do with.

    Args:
        versions (dict[str, str]): As :func:`installed` returns them.

    Returns:
        list[tuple[str, str]]: What is wrong, and the cure, for each.
    """
    return [
        (f'{name} {versions[name]} is too new for {beside} {versions[beside]}', cure)
        for name, first, beside, cure in TOO_NEW
        if name in versions and beside in versions and release(versions[name]) >= release(first)
    ]


def overwritten(versions: dict[str, str]) -> list[tuple[str, str]]:
    """Find packages that were installed over one another.

    Args:
        versions (dict[str, str]): As :func:`installed` returns them.

    Returns:
        list[tuple[str, str]]: What is wrong, and the cure, for each.
    """
    found = []
    for module, owners in OWNERS.items():
        both = [name for name in owners if name in versions]
        if len(both) > 1:
            names = ' and '.join(f'{name} {versions[name]}' for name in both)
            again = ' or '.join(f'pip install --no-deps {name}=={versions[name]}' for name in both)
            found.append(
                (
                    f'{names} are both installed and both write the files of {module}: '
                    'the later one overwrote the other, pip does not notice',
                    f'pip uninstall -y {" ".join(both)}, then one of them alone: {again}',
                )
            )
    return found


def problems(versions: dict[str, str]) -> list[tuple[str, str]]:
    """Find what is wrong by the versions alone.

    Args:
        versions (dict[str, str]): As :func:`installed` returns them.

    Returns:
        list[tuple[str, str]]: What is wrong, and the cure, for each.
    """
    return overwritten(versions) + too_old(versions) + too_new(versions)


def cure_of(said: str) -> str:
    """Tell what to do about an error.

    Args:
        said (str): The message of the error, or all that a process printed.

    Returns:
        str: What is wrong and the commands that mend it; empty if nothing is known.

    Examples:
        >>> cure_of("No module named 'safetensors'")
        'pip install safetensors'
    """
    for pattern, cure in CURES:
        if re.search(pattern, said):
            return cure.replace(BUILD_MMCV, BUILD_FORK) if has_forks() else cure
    names = re.findall(r"No module named '(\w+)", said)
    return how_to_install(names[-1]) if names else ''


def explain(err: BaseException) -> str:
    """Tell what to do about an import that failed.

    Args:
        err (BaseException): The error; what it was raised from is read, too.

    Returns:
        str: The cure, and what else is wrong with the installed packages; perhaps empty.

    Examples:
        >>> explain(ModuleNotFoundError("No module named 'pkg_resources'"))
        'setuptools 82 has no pkg_resources any more: pip install "setuptools<81"'
    """
    # With the names of the files, which tell what package it was.
    said = ''.join(traceback.format_exception(err))
    found = [f'{what}: {cure}' for what, cure in problems(installed())]
    return '. '.join(filter(None, [cure_of(said), *found]))


def check_core() -> None:
    """Import what the backbone is built on, and tell how to mend it if that fails.

    Raises:
        ImportError: If torch, NumPy, mmengine or mmcv cannot be imported.
    """
    core = installed(['torch', 'numpy', *OWNERS['mmengine'], *OWNERS['mmcv']])
    for what, cure in overwritten(core):
        # It may work, or not: that depends on which was installed last.
        warnings.warn(f'{what}. To mend it: {cure}', RuntimeWarning, stacklevel=3)
    try:
        for name in ('torch', 'numpy', 'mmengine.registry', 'mmcv.cnn'):
            importlib.import_module(name)
    except Exception as err:  # also what a package that was built for another NumPy raises
        here = ', '.join(' '.join(item) for item in core.items()) or 'none of them'
        raise ImportError(
            f'mmhrformer is built on torch, NumPy, mmengine and mmcv: {err}. To mend it: '
            f'{explain(err) or CORE}. Installed: {here}'
        ) from err


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

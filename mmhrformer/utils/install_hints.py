"""Installed packages, conflicts between them, and the commands that fix an installation.

OpenMMLab's packages exist in two families: the stock ones, last released between 2023 and 2025,
and maintained forks of some of them, called ``onedl-...``, with the same import names. This module
uses only the standard library, so it works where torch or mmcv cannot be imported.
"""

from __future__ import annotations

import importlib
import re
import traceback
import warnings
from collections.abc import Iterable
from importlib import metadata

from .addresses import find_page

# Import name -> the distributions that provide it. They install the same files.
OWNERS = {
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'mmcv-full', 'onedl-mmcv'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
    'mmpose': ('mmpose',),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
}
EXTRA_PACKAGES = (
    'torch', 'torchvision', 'numpy', 'xtcocotools', 'transformers', 'safetensors', 'onnx',
    'onnxruntime', 'setuptools', 'openmim', 'onedl-mim',
)  # fmt: skip
NAMES = (*EXTRA_PACKAGES, *(name for owners in OWNERS.values() for name in owners))

# The oldest versions that the extras of this package accept.
MINIMUM = {
    'torch': '2.1', 'mmengine': '0.10.3', 'mmcv': '2.0.1', 'mmcv-lite': '2.0.1',
    'mmpretrain': '1.0', 'mmpose': '1.0', 'mmdet': '3.0', 'mmsegmentation': '1.0',
}  # fmt: skip

BUILD_MMCV = (
    'pip uninstall -y mmcv mmcv-lite && pip install "setuptools<82" wheel ninja psutil && '
    'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir --no-binary mmcv mmcv==2.1.0'
)
FORKS = 'or, of the maintained forks: pip install'
CORE = f"pip install 'mmhrformer[core]'; {FORKS} onedl-mmengine onedl-mmcv"

OLDER_TRANSFORMERS = (
    "pip install 'transformers>=4.28,<4.56', or, if nothing else needs it, pip uninstall -y "
    'transformers: mmhrformer does not use it'
)

BUILD_FORK = (
    'pip install "setuptools<82" wheel ninja psutil && MMCV_WITH_OPS=1 pip install --no-deps '
    '--force-reinstall --no-build-isolation --no-cache-dir --no-binary onedl-mmcv onedl-mmcv'
)

# Import name -> how to install it, from either family.
INSTALL = {
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
    'torchvision': 'pip install torchvision, in the version that matches your torch',
    'mim': (
        'nothing: python -m mmhrformer works without it. If you want it: '
        'pip install openmim "setuptools<82", or pip install onedl-mim'
    ),
}

# The same for environments with the forks: a stock package would overwrite them.
INSTALL_FORKS = {
    'mmengine': 'pip install onedl-mmengine',
    'mmcv': 'pip install onedl-mmcv',
    'mmpretrain': 'pip install onedl-mmpretrain',
    'mmpose': (
        'mmpose has no maintained fork, and the stock packages that it needs would overwrite the '
        'installed forks: create a separate environment for it '
        f'({find_page("docs/compatibility.md")})'
    ),
    'mmseg': 'pip install onedl-mmsegmentation ftfy regex',
    'mmdet': 'pip install onedl-mmdetection',
}

# Import name -> distributions. The frameworks import most of them without declaring all.
SAME_IMPORT_NAME = (
    'addict', 'einops', 'importlib_metadata', 'json_tricks', 'matplotlib', 'modelindex', 'munkres',
    'numpy', 'packaging', 'prettytable', 'pycocotools', 'rich', 'safetensors', 'scipy', 'seaborn',
    'shapely', 'termcolor', 'terminaltables', 'tqdm', 'xtcocotools', 'yapf',
)  # fmt: skip
DISTRIBUTIONS = {
    **dict(zip(SAME_IMPORT_NAME, SAME_IMPORT_NAME)),
    'cv2': 'opencv-python', 'PIL': 'pillow', 'yaml': 'pyyaml', 'torch': 'torch torchvision',
    **dict.fromkeys(['ftfy', 'regex'], 'ftfy regex'),
    **dict.fromkeys(['onnx', 'onnxruntime', 'onnxslim'], 'onnx onnxruntime onnxslim'),
}  # fmt: skip
INSTALL.update((module, f'pip install {names}') for module, names in DISTRIBUTIONS.items())

# Pattern of an error message -> cause and fix. The first match wins.
FIXES = (
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
        'xtcocotools was built for NumPy 1. Build it for yours: pip install cython "setuptools<82" '
        '&& pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir '
        '--no-binary xtcocotools xtcocotools; or go back: pip install "numpy<2"',
    ),
    (
        r"transformers[\w.]*' \(|No module named 'transformers\.|module 'transformers",
        'mmpretrain 1.2 imports names that newer transformers no longer have, and mmsegmentation '
        f'and mmdet import mmpretrain: {OLDER_TRANSFORMERS}',
    ),
    (
        r'[Cc]ould not determine (the )?home directory',
        'a core library needs a home directory: set HOME to a writable folder, such as HOME=/tmp',
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
        'setuptools 82 removed pkg_resources: pip install "setuptools<82"',
    ),
    (
        r'operator torchvision::nms does not exist|torchvision\S*: undefined symbol',
        'this torchvision was built for another torch (its version, or CPU instead of CUDA): pip '
        'install --force-reinstall --no-deps torchvision, in the version that matches your torch '
        'and from the same index',
    ),
)  # fmt: skip

# Packages that are too new: name, first incompatible version, incompatible with, fix.
TOO_NEW = (
    ('transformers', '4.56', 'mmpretrain', OLDER_TRANSFORMERS),
    ('setuptools', '82', 'openmim', 'pip install "setuptools<82"'),
    ('mmcv', '2.2', 'mmsegmentation', BUILD_MMCV),
    ('mmcv', '2.2', 'mmdet', BUILD_MMCV),
)


def installed(names: Iterable[str] = NAMES) -> dict[str, str]:
    """Look up the versions of packages.

    Args:
        names (Iterable[str]): Names of distributions. Defaults to those in the report.

    Returns:
        dict[str, str]: Versions of the installed ones, by name.

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


def has_stock_packages() -> bool:
    """Whether stock packages that have a fork, or that need such packages, are installed."""
    names = (name for owners in OWNERS.values() for name in owners)
    return bool(installed(name for name in names if not name.startswith('onedl-mm')))


def how_to_install(module: str) -> str:
    """Look up how to install a package, from the family that is already installed.

    Args:
        module (str): Import name.

    Returns:
        str: Commands; empty if none are known.

    Examples:
        >>> how_to_install('safetensors')
        'pip install safetensors'
    """
    if has_forks():
        return {**INSTALL, **INSTALL_FORKS}.get(module, '')
    fix = INSTALL.get(module, '')
    return fix.partition(f'; {FORKS}')[0] if has_stock_packages() else fix


def _release(version: str) -> tuple[int, ...]:
    """Parse a version such as ``'2.1.2+cu121'`` into a comparable tuple such as (2, 1, 2)."""
    return tuple(map(int, re.findall(r'\d+', re.split(r'[^\d.]', version)[0])))


def overwritten(versions: dict[str, str]) -> list[tuple[str, str]]:
    """Find packages that overwrote each other's files, see :func:`problems`."""
    found = []
    for module, owners in OWNERS.items():
        both = [name for name in owners if name in versions]
        if len(both) > 1:
            names = ' and '.join(f'{name} {versions[name]}' for name in both)
            again = ' or '.join(f'pip install --no-deps {name}=={versions[name]}' for name in both)
            problem = (
                f'{names} are both installed and both provide {module}: '
                'the later one overwrote the other without pip noticing'
            )
            fix = f'pip uninstall -y {" ".join(both)}, then install only one of them: {again}'
            found.append((problem, fix))
    return found


def problems(versions: dict[str, str]) -> list[tuple[str, str]]:
    """Find problems that show in the versions alone: packages overwritten, too old or too new.

    Args:
        versions (dict[str, str]): As :func:`installed` returns them.

    Returns:
        list[tuple[str, str]]: Problems, each with its fix.
    """
    found = overwritten(versions)
    for name, oldest in MINIMUM.items():
        if name in versions and _release(versions[name]) < _release(oldest):
            problem = f'{name} {versions[name]} is too old, the oldest that works is {oldest}'
            found.append((problem, f"pip install -U '{name}>={oldest}'"))
    for name, first, peer, fix in TOO_NEW:
        if {name, peer} <= versions.keys() and _release(versions[name]) >= _release(first):
            problem = f'{name} {versions[name]} is too new for {peer} {versions[peer]}'
            found.append((problem, fix))
    return found


def suggest_fix(text: str) -> str:
    """Look up the fix for an error.

    Args:
        text (str): The error message, or the whole output of a process.

    Returns:
        str: The cause and the commands that fix it; empty if none are known.

    Examples:
        >>> suggest_fix("No module named 'safetensors'")
        'pip install safetensors'
    """
    for pattern, fix in FIXES:
        if re.search(pattern, text):
            return fix.replace(BUILD_MMCV, BUILD_FORK) if has_forks() else fix
    names = re.findall(r"No module named '(\w+)", text)
    return how_to_install(names[-1]) if names else ''


def explain(err: BaseException) -> str:
    """Look up the fix for a failed import.

    Args:
        err (BaseException): The error; its causes are considered as well.

    Returns:
        str: The fix, and other problems of the installed packages; may be empty.

    Examples:
        >>> explain(ModuleNotFoundError("No module named 'pkg_resources'"))
        'setuptools 82 removed pkg_resources: pip install "setuptools<82"'
    """
    # The traceback contains file names, which identify the package.
    fix = suggest_fix(''.join(traceback.format_exception(err)))
    found = [f'{problem}: {its_fix}' for problem, its_fix in problems(installed())]
    return '. '.join(filter(None, [fix, *found]))


def with_fix(err: BaseException) -> str:
    """Message of an error, followed by its fix if :func:`explain` knows one and it has none yet."""
    fix = '' if 'Fix: ' in str(err) else explain(err)
    return f'{err}. Fix: {fix}' if fix else str(err)


def check_core() -> None:
    """Import the core dependencies; on failure, say how to fix the installation.

    Raises:
        ImportError: If torch, NumPy, mmengine or mmcv cannot be imported.
    """
    core = installed(['torch', 'numpy', *OWNERS['mmengine'], *OWNERS['mmcv']])
    for problem, fix in overwritten(core):
        # A warning only: it may work, depending on which one was installed last.
        warnings.warn(f'{problem}. Fix: {fix}', RuntimeWarning, stacklevel=3)
    try:
        for name in ('torch', 'numpy', 'mmengine.registry', 'mmcv.cnn'):
            importlib.import_module(name)
    except Exception as err:  # not ImportError alone, as with packages built for another NumPy
        here = ', '.join(' '.join(item) for item in core.items()) or 'none of them'
        absent = isinstance(err, ModuleNotFoundError) and err.name in ('torch', 'numpy', *OWNERS)
        raise ImportError(
            f'mmhrformer needs torch, NumPy, mmengine and mmcv: {err}. Fix: '
            f'{explain(err) or CORE}. Installed: {here}'
        ) from (None if absent else err)  # what is not installed needs no second traceback

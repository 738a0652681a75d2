"""Finding and reading the shipped configs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config

from .utils.install_hints import how_to_install
from .utils.suggest import did_you_mean

# default_scope of a config -> the package whose tools run it
PACKAGES = {
    'mmpretrain': 'mmpretrain',
    'mmpose': 'mmpose',
    'mmseg': 'mmsegmentation',
    'mmdet': 'mmdet',
}


def config_root() -> Path:
    """Locate our configs: next to the package in a checkout, inside it when installed.

    Returns:
        Path: The folder.

    Raises:
        FileNotFoundError: If the installation has no configs.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / 'configs', package / '.mim' / 'configs'):
        if (folder / 'model-index.yml').is_file():
            return folder
    raise FileNotFoundError(f'no configs found next to {package}: reinstall mmhrformer')


def find_framework(scope: str) -> Path:
    """Find the installed framework of a config, without importing it.

    Args:
        scope (str): The ``default_scope`` of the config, a key of :data:`PACKAGES`.

    Returns:
        Path: The folder of the package.

    Raises:
        ModuleNotFoundError: If it is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(scope)
    if spec is None:
        text = f'the config needs {PACKAGES[scope]}: {how_to_install(scope)}'
        raise ModuleNotFoundError(text, name=scope)
    return Path(spec.origin).parent


def find_config(name: str) -> Path:
    """Find a config by its path, or one of ours by its name.

    Args:
        name (str): Path of a config, or name of one of ours, with or without ``.py``.

    Returns:
        Path: The config file.

    Raises:
        FileNotFoundError: If there is no such config; the message suggests similar names.

    Examples:
        >>> find_config('hrformer-tiny_8xb128_in1k').name
        'hrformer-tiny_8xb128_in1k.py'
    """
    if Path(name).is_file():
        return Path(name)
    ours = {path.stem: path for path in config_root().glob('[!_]*/*.py')}
    wanted = Path(name).name.removesuffix('.py')
    if wanted in ours:
        return ours[wanted]
    hint = did_you_mean(wanted, ours) or f'ours are in {config_root()}'
    raise FileNotFoundError(f'there is no config {name!r}: {hint}')


def read_config(path: str | Path) -> Config:
    """Read a config.

    Args:
        path (str | Path): The file.

    Returns:
        Config: The config.

    Raises:
        ValueError: If it is not valid Python; unlike mmengine's, the error names the file.
    """
    try:
        return Config.fromfile(path)
    except SyntaxError as err:
        raise ValueError(
            f'cannot read the config {str(path)!r} or one of its _base_ files: {err.msg}, line '
            f'{err.lineno}. Correct that line'
        ) from err


def open_config(model: str | Path | Config) -> Config:
    """Find and read the config of a model, unless it has been read already.

    Args:
        model (str | Path | Config): As for :func:`find_config`, or a config.

    Returns:
        Config: The config; the given one if it was a config.

    Raises:
        FileNotFoundError: If there is no such config; the message suggests similar names.
        ValueError: If it cannot be read.
    """
    return model if isinstance(model, Config) else read_config(find_config(str(model)))


def name_of(cfg: Config) -> str:
    """Name of a config: its file name without folder and suffix, empty if it has no file."""
    return Path(cfg.filename or '').stem


def name_of_type(option: Mapping) -> str:
    """Name of the class of a config, without the scope; empty if it has none."""
    kind = option.get('type', '')
    return kind.split('.')[-1] if isinstance(kind, str) else getattr(kind, '__name__', '')

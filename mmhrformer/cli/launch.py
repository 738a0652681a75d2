"""Running the stock tools of the framework that a config is for."""

from __future__ import annotations

import contextlib
import importlib.util
import runpy
import sys
import traceback
from pathlib import Path

from mmengine.config import Config

from ..checkpoints import detect_dialect, unwrap
from ..checkpoints.loading import SCHEME, name_file_in_errors, read
from ..configs import PACKAGES, config_root, find_config, find_framework, read_config
from ..engine.config_check import ConfigCheckError
from ..engine.cpu_ddp import prepare_cpu_launch
from ..utils.install_hints import explain, with_fix


def stock_tool(scope: str, tool: str) -> Path:
    """Find a script of a framework.

    Args:
        scope (str): A key of :data:`PACKAGES`, such as ``'mmpose'``.
        tool (str): Name of the script, such as ``'train'``, in any folder of tools.

    Returns:
        Path: The script.

    Raises:
        ValueError: If the scope is not one of those.
        ImportError: If the framework is not installed.
        FileNotFoundError: If it is installed without the script.
    """
    if scope not in PACKAGES:
        raise ValueError(f'default_scope={scope!r} in the config: choose one of {list(PACKAGES)}')
    package = find_framework(scope)
    for folder in (package / '.mim' / 'tools', package.parent / 'tools'):
        scripts = sorted(folder.rglob(f'{tool}.py'))
        if scripts:  # prefer the one closest to the top
            return min(scripts, key=lambda script: len(script.parts))
    raise FileNotFoundError(f'{PACKAGES[scope]} in {package} has no tool {tool}.py: reinstall it')


def run_stock_tool(tool: str, args: list[str]) -> None:
    """Run a stock tool in this process, as from the command line.

    Args:
        tool (str): Name of the script, such as ``'train'``.
        args (list[str]): Its arguments; the first is a config, by path or by name.
    """
    # torch.distributed.launch, which mim uses, inserts `--local-rank=0` before the config.
    args = sorted(args, key=lambda arg: arg.startswith(('--local-rank=', '--local_rank=')))
    if not args or args[0] in ('-h', '--help'):
        return print_help(tool)
    try:
        config = find_config(args[0])
        cfg = read_config(config)
        script = stock_tool(cfg.get('default_scope'), tool)
        rest = args[1:]
        if tool == 'test' and rest and not {'-h', '--help'} & set(rest):
            if rest[0].startswith('-'):
                raise ValueError(f'got {rest[0]!r} after CONFIG: put CHECKPOINT there')
            rest[0] = resolve_checkpoint(rest[0], _has_other_backbone(cfg))
    except (ImportError, OSError, RuntimeError, ValueError) as err:
        sys.exit(f'{tool}.py: {with_fix(err)}')
    prepare_cpu_launch(rest)
    try:
        run_script(script, [str(config), *rest])
    except ConfigCheckError as err:  # the message is enough, without a traceback
        sys.exit(f'{tool}.py: {err}')


def print_help(tool: str) -> None:
    """Print a description of our tool, and the options of a stock one.

    Args:
        tool (str): Name of the script, such as ``'train'``.
    """
    checkpoint = ' CHECKPOINT' * (tool == 'test')
    print(
        f'usage: {tool}.py CONFIG{checkpoint} [arguments]\n\n'
        f'Runs {tool}.py of the framework that CONFIG is for (its default_scope), with the\n'
        'same arguments. CONFIG is a path, or the name of one of the configs of mmhrformer.\n'
        f'Example: python -m mmhrformer {tool} hrformer-tiny_8xb128_in1k{checkpoint}\n'
    )
    here = [scope for scope in PACKAGES if importlib.util.find_spec(scope)]
    if not here:
        print('No framework is installed: python -m mmhrformer env')
        return
    print(f'Options of {PACKAGES[here[0]]} (for another framework: {tool}.py CONFIG -h):\n')
    with contextlib.suppress(SystemExit):
        run_script(stock_tool(here[0], tool), ['--help'])


def run_script(script: Path, args: list[str]) -> None:
    """Run a script in this process like Python does; say how to fix failed imports.

    Args:
        script (Path): The script.
        args (list[str]): Its arguments.
    """
    sys.argv = [str(script), *args]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name='__main__')
    except ConfigCheckError:
        raise
    except Exception as err:  # not ImportError alone, as with packages built for another torch
        if not (fix := explain(err)):
            raise
        traceback.print_exc()
        sys.exit(f'{script.name}: {err}. Fix: {fix}')


def run_tool(name: str, args: list[str]) -> None:
    """Run one of our scripts in this process, from the checkout or the installed package.

    Args:
        name (str): Name of a script in ``tools``, such as ``'get_flops'``.
        args (list[str]): Its arguments.
    """
    run_script(config_root().parent / 'tools' / f'{name}.py', args)


def _has_other_backbone(cfg: Config) -> bool:
    """Whether a model has another backbone, such as the HRNets of the ablations."""
    kind = str(((cfg.get('model') or {}).get('backbone') or {}).get('type', ''))
    return bool(kind) and 'HRFormer' not in kind


def resolve_checkpoint(checkpoint: str, other_backbone: bool = False) -> str:
    """Find and check a checkpoint before a stock tool reads it.

    Args:
        checkpoint (str): Path, URL, or ``mmhrformer://NAME_OR_PATH``.
        other_backbone (bool): Whether the model has another backbone than HRFormer, whose
            checkpoints may be in any format. Defaults to False.

    Returns:
        str: The argument for the stock tool: ``mmhrformer://`` and the file, so that it is read
        without running code from it and converted. URLs, and files of another backbone, are not
        changed.

    Raises:
        FileNotFoundError: If there is no such file.
        DownloadError: If a file does not match the hash in its name.
        ValueError: If it cannot be read, or has no weights in a known format.
    """
    if '://' in checkpoint and not checkpoint.startswith(SCHEME):
        return checkpoint
    path, content = read(checkpoint)
    try:
        with name_file_in_errors(path):
            detect_dialect(unwrap(content))
    except ValueError:
        if other_backbone:
            return str(path)
        raise
    return f'{SCHEME}{path}'

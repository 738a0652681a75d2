"""Conversion of weights to the formats of other codes, and writing of checkpoint files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import torch
from torch import Tensor

from ..ops.windows import relative_position_index
from ..utils.files import whole_file
from .contents import unwrap
from .dialects import (
    BIAS_TABLE,
    DERIVED_BUFFER,
    DIALECTS,
    SEPARATE_PROJECTIONS,
    Dialect,
    convert,
    detect_dialect,
    rename,
    window_of,
)

TARGETS = ('official', 'mmpose', 'mmhrformer')
SAFETENSORS = '.safetensors'


def to_dialect(
    state_dict: Mapping[str, Tensor], target: str, backbone_only: bool = False
) -> dict[str, Tensor]:
    """Convert tensors to the format of another code, the inverse of :func:`convert`.

    For the official codes, query, key and value are separated; for these and mmpose, the buffers
    that are computed here are added, so that their models load the tensors strictly. A model
    without relative position bias has no tables for mmpose, whose config needs ``with_rpe=False``.
    The official pose code, as published, does not add this bias, so models trained with it give
    different results there.

    Args:
        state_dict (Mapping[str, Tensor]): A whole model or a backbone, in any dialect.
        target (str): One of :data:`TARGETS`. With ``'official'`` the head determines which of the
            three official codes it is.
        backbone_only (bool): Whether to convert only the backbone, without ``backbone.`` in its
            names, as pretrained weights for training. Defaults to False.

    Returns:
        dict[str, Tensor]: The tensors by the names of the target.

    Raises:
        ValueError: If the dialect or target is unknown, or the target has no such head or needs
            relative position biases that are missing.

    Examples:
        >>> from mmhrformer import HRFormer
        >>> theirs = to_dialect(HRFormer('tiny').state_dict(), 'official')
        >>> theirs['stage2.0.branches.0.0.attn.attn.k_proj.weight'].shape
        torch.Size([18, 18])
    """
    if target not in TARGETS:
        raise ValueError(f'target={target!r} is unknown: choose one of {list(TARGETS)}')
    tensors, _ = convert(state_dict)
    if backbone_only and _is_whole(tensors):
        tensors = _backbone_of(tensors)
    if target == 'mmhrformer':
        return tensors
    return _translate_back(tensors, DIALECTS[_choose_dialect(tensors, target)])


def _is_whole(tensors: Iterable[str]) -> bool:
    return any(key.startswith('backbone.') for key in tensors)


def _backbone_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = 'backbone.'
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}


def _choose_dialect(tensors: Iterable[str], target: str) -> str:
    """The dialect of the target whose head consists of exactly these tensors."""
    rest = [key for key in tensors if not key.startswith('backbone.')]
    if not (rest and _is_whole(tensors)):
        return 'official-backbone' if target == 'official' else target
    for name, dialect in DIALECTS.items():
        starts = [ours for _, ours in dialect.starts]
        used = {start for start in starts for key in tensors if key.startswith(start)}
        complete = len(used) == len(starts)
        if name.startswith(target) and complete and all(k.startswith(tuple(starts)) for k in rest):
            return name
    raise ValueError(
        f'no {target} HRFormer has this neck or head ({len(rest)} tensors such as {rest[0]!r}): '
        'only the backbone can be converted. Set backbone_only=True, or --backbone-only on the '
        'command line'
    )


def _translate_back(tensors: Mapping[str, Tensor], dialect: Dialect) -> dict[str, Tensor]:
    """Separate query, key and value, add derived buffers, and rename; into a new dict."""
    spread = {}
    for name, tensor in tensors.items():
        if dialect.separate and '.qkv.' in name:
            if name.endswith('.weight'):
                spread.update(_separate(name.removesuffix('qkv.weight'), tensors))
            continue
        spread[name] = tensor
        if name.endswith(BIAS_TABLE):
            buffer = name.removesuffix(BIAS_TABLE) + DERIVED_BUFFER
            spread[buffer] = relative_position_index(window_of(tensor))
    starts = [(ours, theirs) for theirs, ours in dialect.starts]
    blocks = [(ours, theirs) for theirs, ours in dialect.blocks]
    return {rename(name, starts, blocks): tensor for name, tensor in spread.items()}


def _separate(attention: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projections of query, key and value of a block, in the order of official files."""
    for needed in ('qkv.bias', BIAS_TABLE):
        if attention + needed not in tensors:
            raise ValueError(
                f'the official codes need {needed!r} in every block, but there is no '
                f'{attention + needed!r}. If the model was trained with with_rpe=False, load the '
                'checkpoint into one with with_rpe=True, set all relative position bias tables '
                'to zero, which changes no output, and convert that'
            )
    parts = {}
    for part in ('k_proj', 'v_proj', 'q_proj'):
        place = SEPARATE_PROJECTIONS.index(part)
        for kind in ('weight', 'bias'):
            joined = tensors[f'{attention}qkv.{kind}']
            parts[f'{attention}{part}.{kind}'] = joined.chunk(3)[place].clone()
    return parts


def wrap(tensors: Mapping[str, Tensor], meta: Mapping | None = None) -> dict:
    """Pack tensors like the code of their dialect, the inverse of :func:`unwrap`.

    Args:
        tensors (Mapping[str, Tensor]): Tensors by name, in any dialect.
        meta (Mapping, optional): Content of ``'meta'``, if files of the dialect have it.

    Returns:
        dict: Content of a file that the code can read.

    Raises:
        ValueError: If the dialect is unknown.

    Examples:
        >>> from mmhrformer import HRFormer
        >>> list(wrap(HRFormer('tiny').state_dict()))
        ['meta', 'state_dict']
    """
    dialect = DIALECTS[detect_dialect(tensors)]
    content = {dialect.extra_key: {}} if dialect.extra_key else {}
    if 'meta' in content:
        content['meta'].update(meta or {})
    content[dialect.container] = {dialect.prefix + key: tensor for key, tensor in tensors.items()}
    return content


def check_destination(path: str | Path, overwrite: bool = False) -> Path:
    """Check that a checkpoint can be written, before any work is done.

    Args:
        path (str | Path): The file to write.
        overwrite (bool): Whether it may exist. Defaults to False.

    Returns:
        Path: The file, with links resolved.

    Raises:
        FileExistsError: If it exists and ``overwrite`` is not set.
        IsADirectoryError: If it is a folder.
        FileNotFoundError: If its folder does not exist.
        ImportError: If its format needs a package that is not installed.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f'{str(path)!r} is a folder: specify a file')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {str(path.parent)!r}: create it first')
    if path.exists() and not overwrite:
        raise FileExistsError(
            f'{str(path)!r} exists: choose another file, or overwrite it (overwrite=True, or '
            '--overwrite on the command line)'
        )
    if path.suffix == SAFETENSORS:
        _import_safetensors()
    return path


def write_checkpoint(content: Mapping, path: str | Path, overwrite: bool = False) -> None:
    """Write a checkpoint file, completely or not at all.

    Args:
        content (Mapping): The content, as :func:`wrap` returns it, or tensors by name. A
            ``.safetensors`` file gets only the tensors, without wrapping, and their dialect.
        path (str | Path): The file. With the suffix ``.safetensors`` it is written in that format,
            otherwise in that of ``torch.save``.
        overwrite (bool): Whether the file may exist. Defaults to False.

    Raises:
        OSError: If the file exists and ``overwrite`` is not set (FileExistsError), or it cannot be
            written.
        ImportError: If its format needs a package that is not installed.
        ValueError: If the format stores the dialect and it is unknown.

    Examples:
        >>> import tempfile
        >>> from mmhrformer import HRFormer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_checkpoint(wrap(HRFormer('tiny').state_dict()), f'{folder}/tiny.pth')
    """
    path = check_destination(path, overwrite)
    if path.suffix == SAFETENSORS:
        packed = _pack_safetensors(unwrap(content))
        _write_whole(path, lambda file: file.write(packed))
    else:
        _write_whole(path, lambda file: torch.save(content, file))


def _pack_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    # Copies, since the format supports neither views nor shared memory.
    tensors = {key: tensor.cpu().clone().contiguous() for key, tensor in tensors.items()}
    metadata = {'format': 'pt', 'dialect': detect_dialect(tensors)}
    return _import_safetensors().save(tensors, metadata)


def _import_safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as err:
        raise ImportError(
            f'{SAFETENSORS} files need the package safetensors: pip install safetensors, or choose '
            'another extension, such as .pth'
        ) from err
    return safetensors.torch


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically, with a clear error if that fails."""
    try:
        with whole_file(path) as file:
            write(file)
    except (OSError, RuntimeError) as err:
        # On a full disk, torch only reports an unexpected position in the file.
        cause = err.__context__ if isinstance(err.__context__, OSError) else err
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise OSError(f'cannot write {str(path)!r}: {reason}') from err

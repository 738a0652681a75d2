"""Load a checkpoint of any dialect into a whole model."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import nn

from ..launch import did_you_mean
from .dialects import BIAS_TABLE, Report, check_finite, convert, unwrap
from .download import check_hash
from .reading import read_checkpoint
from .zoo import fetch, read_zoo

HEAD = re.compile(r'(head|decode_head|auxiliary_head)\.')


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | Path | MutableMapping,
    strict: bool = False,
    new_classes: bool = False,
) -> Report:
    """Load a checkpoint of any dialect into a model built from one of our configs.

    Args:
        model (nn.Module): A classifier, pose estimator or segmentor with an HRFormer backbone, or
            a bare :class:`HRFormer`.
        checkpoint (str | Path | MutableMapping): A file, a name of the zoo, or what was saved.
        strict (bool): Whether a missing or unused tensor is an error. Defaults to False.
        new_classes (bool): Whether layers of the head that have another shape in the checkpoint
            are left as they are: for training on other classes. Defaults to False, an error.

    Returns:
        Report: What became of each tensor; it is also logged.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, is of no known dialect, or has numbers that are not
            finite.
        RuntimeError: If tensors do not fit, or with ``strict`` are missing or unused.

    Examples:
        >>> from mmhrformer import HRFormer
        >>> model = HRFormer(arch='tiny')
        >>> load_checkpoint(model, model.state_dict()).unused
        []
    """
    if isinstance(checkpoint, MutableMapping):
        return _load(model, checkpoint, strict, new_classes)
    path = locate(checkpoint)
    content = read_checkpoint(path)
    with _naming(path):
        return _load(model, content, strict, new_classes)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Tell which file an error is about."""
    try:
        yield
    except (RuntimeError, ValueError) as err:
        kind = ValueError if isinstance(err, ValueError) else RuntimeError
        raise kind(f'{str(path)!r}: {err}') from err


def _load(model: nn.Module, checkpoint: MutableMapping, strict: bool, new_classes: bool) -> Report:
    """Load what was saved into a model, see :func:`load_checkpoint`."""
    tensors = unwrap(checkpoint)
    state_dict, report = convert(tensors)
    check_finite(tensors)
    names = _names_in(model, state_dict)
    state_dict = {names[key]: tensor for key, tensor in state_dict.items()}
    own = model.state_dict()
    differing = {k for k, v in state_dict.items() if k in own and own[k].shape != v.shape}
    report.resized = [key for key in differing if key.endswith(BIAS_TABLE)]
    if new_classes:
        report.other_shape = [key for key in differing if HEAD.match(key)]
        for key in report.other_shape:
            del state_dict[key]
    report.dropped += [key for key in state_dict if key.endswith(BIAS_TABLE) and key not in own]
    _refuse_other_shapes(own, state_dict, differing - set(report.other_shape))
    missing, unused = model.load_state_dict(state_dict, strict=False)
    in_file = {name: key for key, name in names.items()}
    in_file.update((names[new], old) for old, new in report.renamed.items() if new in names)
    report.missing = [key for key in missing if key not in report.other_shape]
    report.unused = [in_file.get(key, key) for key in unused]
    report.used = len(own) - len(missing)
    if strict and (report.missing or report.unused):
        raise RuntimeError(f'the checkpoint is not of this model. {report}')
    incomplete = [key for key in report.missing if not HEAD.match(key)]
    print_log(str(report), 'current', logging.WARNING if incomplete else logging.INFO)
    return report


def _refuse_other_shapes(own: Mapping, state_dict: Mapping, differing: Collection[str]) -> None:
    """Say what to do about tensors that do not fit, before any is loaded."""
    # Bias tables are resized for another window, but not for other heads.
    wrong = [
        key
        for key in state_dict
        if key in differing
        and not (key.endswith(BIAS_TABLE) and own[key].shape[1:] == state_dict[key].shape[1:])
    ]
    if not wrong:
        return
    remedy = 'build the model with the arch, in_channels and neck of the checkpoint'
    if all(map(HEAD.match, wrong)):
        remedy = 'set num_classes to that of the checkpoint, or load with new_classes=True'
    lines = [
        f'  size mismatch for {key}: {tuple(state_dict[key].shape)} in the checkpoint, '
        f'{tuple(own[key].shape)} in the model'
        for key in wrong
    ]
    raise RuntimeError(f'the checkpoint does not fit the model: {remedy}\n' + '\n'.join(lines))


def _names_in(model: nn.Module, state_dict: dict) -> dict[str, str]:
    """The names that tensors of a checkpoint have in a model, which may be a bare backbone."""
    if not hasattr(model, 'backbone'):
        return {key: key.removeprefix('backbone.') for key in state_dict}
    if not any(key.startswith('backbone.') for key in state_dict):
        return {key: 'backbone.' + key for key in state_dict}
    return {key: key for key in state_dict}


SCHEME = 'mmhrformer://'


def locate(name: str | Path) -> Path:
    """Find the file that ``mmhrformer://NAME_OR_PATH`` means.

    Args:
        name (str | Path): Path of a file, or name of a model of the zoo, with or without
            ``mmhrformer://`` before it.

    Returns:
        Path: The file; if its name holds a hash, it has that hash.

    Raises:
        DownloadError: If a file of the zoo cannot be downloaded, or a file is not what its name
            says.
        FileNotFoundError: If there is neither, or the file has to be downloaded by hand.
        ValueError: If nobody published a checkpoint of that model.
    """
    name = str(name).removeprefix(SCHEME)
    path = Path(name).expanduser()
    if path.is_file():
        check_hash(path)
        return path
    if name.partition('@')[0] in read_zoo():
        return fetch(name)
    raise FileNotFoundError(
        f'there is no checkpoint {name!r}: neither a file (from {Path.cwd()}) nor a model of the '
        f'zoo. {did_you_mean(name, read_zoo(), "Did")} mmhrformer.list_models() lists the zoo'
    )


@CheckpointLoader.register_scheme(prefixes=SCHEME)
def load_from_scheme(filename: str, map_location=None, logger: str = 'current') -> dict:
    """Read ``mmhrformer://NAME_OR_PATH`` wherever mmengine takes a checkpoint.

    The file may be of any dialect and is read without running code from it; the tensors come out
    with the names they have here. Other contents of the file are left behind.

    Args:
        filename (str): ``mmhrformer://`` and the path of a file, or the name of a model of the
            zoo, which is downloaded if need be.
        map_location (optional): Tensors are always read on the CPU; models copy them from there.
        logger (str): Where to tell what was read. Defaults to ``'current'``.

    Returns:
        dict: The tensors by name, under ``'state_dict'``; ``'meta'``, which mmseg wants, is empty.

    Raises:
        DownloadError: As :func:`locate`.
        FileNotFoundError: Likewise.
        ValueError: If the file cannot be read, is of no known dialect, or has numbers that are not
            finite.
    """
    path = locate(filename)
    content = read_checkpoint(path)
    with _naming(path):
        tensors = unwrap(content)
        state_dict, report = convert(tensors)
        check_finite(tensors)
    print_log(f'{path}: {report.dialect} checkpoint of {len(state_dict)} tensors', logger)
    return dict(meta={}, state_dict=state_dict)

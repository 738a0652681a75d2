"""Loading of checkpoints in any format into whole models."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import nn

from ..utils.suggest import did_you_mean
from .contents import (
    SWAPPED,
    Contents,
    describe_other_weights,
    find_weights,
    meta_of_checkpoint,
    plain_name,
)
from .dialects import BIAS_TABLE, Report, check_finite, convert
from .reading import read_checkpoint
from .zoo import find_file, read_zoo

SCHEME = 'mmhrformer://'
HEAD = re.compile(r'(head|decode_head|auxiliary_head)\.')


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | Path | Mapping,
    strict: bool = False,
    new_classes: bool = False,
    key: str | None = None,
) -> Report:
    """Load a checkpoint in any supported format into a model built from one of our configs.

    Args:
        model (nn.Module): A whole model with an HRFormer backbone, or a bare :class:`HRFormer`.
        checkpoint (str | Path | Mapping): A file, a name of the zoo, or the content of a file.
        strict (bool): Whether missing or unused tensors are an error; tensors of the file that do
            not belong to the model, such as a loss's, are not. Defaults to False.
        new_classes (bool): Whether to skip layers of the head that have another shape in the
            checkpoint, for training on other classes. Defaults to False: they are an error.
        key (str, optional): Key of the weights to load from a file with several, such as
            ``'state_dict_ema'``, or prefix of their names. Defaults to None: ``'state_dict'``,
            ``'model'``, or the top level; the report lists others.

    Returns:
        Report: What happened to each tensor; it is also logged.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, is in no known format, has the weights of several
            models and no ``key`` is given, or has weights that are not tensors or not finite.
        RuntimeError: If shapes do not match, or with ``strict`` tensors are missing or unused.

    Examples:
        >>> from mmhrformer import HRFormer
        >>> model = HRFormer(arch='tiny')
        >>> load_checkpoint(model, model.state_dict()).unused
        []
    """
    if isinstance(checkpoint, Mapping):
        return _load(model, checkpoint, strict, new_classes, key)
    path, content = read(checkpoint)
    with name_file_in_errors(path):
        return _load(model, content, strict, new_classes, key)


def read(name: str | Path, whole: bool = False) -> tuple[Path, dict]:
    """Find the checkpoint of ``mmhrformer://NAME_OR_PATH``, read it once, and verify it.

    Args:
        name (str | Path): Path of a file, or name of a model of the zoo, with or without
            ``mmhrformer://`` before it.
        whole (bool): As in :func:`find_source`.

    Returns:
        tuple[Path, dict]: The file and its content.

    Raises:
        DownloadError: If a file of the zoo cannot be downloaded, or a file does not match the hash
            in its name.
        FileNotFoundError: If there is no such file or model, or the file must be downloaded by
            hand.
        ValueError: If no checkpoint of that model was published, or the file cannot be read.
    """
    path, sha256 = _locate(name, whole)
    return path, read_checkpoint(path, sha256)


def _locate(name: str | Path, whole: bool) -> tuple[Path, str]:
    """The file of a checkpoint, and its SHA-256 if the zoo has it."""
    name = str(name).removeprefix(SCHEME)
    path = Path(name).expanduser()
    if path.is_file():
        return path, ''
    if name.partition('@')[0] in read_zoo():
        return find_file(name, whole)
    hint = did_you_mean(name, read_zoo(), 'Did') or 'mmhrformer.list_models() lists its models'
    raise FileNotFoundError(
        f'there is no checkpoint {name!r}: neither a file (in {Path.cwd()}) nor a model of the '
        f'zoo. {hint}'
    )


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Prefix error messages with the name of a file."""
    try:
        yield
    except (RuntimeError, ValueError) as err:
        kind = ValueError if isinstance(err, ValueError) else RuntimeError
        raise kind(f'{str(path)!r}: {err}') from err


@CheckpointLoader.register_scheme(prefixes=SCHEME)
def load_from_scheme(filename: str, map_location=None, logger: str = 'current') -> dict:
    """Read ``mmhrformer://NAME_OR_PATH`` where mmengine accepts a checkpoint.

    The file may be in any supported format and is read without running code from it; the tensors
    are renamed to our names. Other contents of the file are dropped.

    Args:
        filename (str): ``mmhrformer://`` and the path of a file, or the name of a model of the
            zoo, which is downloaded if needed.
        map_location (optional): Ignored: tensors are read on the CPU, and models copy them.
        logger (str): Logger of the message. Defaults to ``'current'``.

    Returns:
        dict: The tensors by name, under ``'state_dict'``, and those of mmengine's EMAHook under
        ``'ema_state_dict'``. ``'meta'`` has the ``dataset_meta`` of the training, if the file
        stores it as plain strings and numbers.

    Raises:
        DownloadError: As :func:`read`.
        FileNotFoundError: As :func:`read`.
        ValueError: If the file cannot be read, is in no known format, or has numbers that are not
            finite.
    """
    path, saved = read(filename)
    with name_file_in_errors(path):
        contents, state_dict, report = _translate(saved)
    lines = [f'{path}: {report.dialect} checkpoint of {len(state_dict)} tensors']
    print_log('\n'.join([*lines, *describe_other_weights(contents.key, contents.others)]), logger)
    dataset_meta = meta_of_checkpoint(saved)
    has_meta = dataset_meta and _is_plain(dataset_meta)
    meta = dict(dataset_meta=dataset_meta) if has_meta else {}
    content = dict(meta=meta, state_dict=state_dict)
    if contents.others.get('ema_state_dict') == SWAPPED:  # the hook needs both
        unaveraged, _ = convert(find_weights(saved, 'ema_state_dict').tensors)
        content['ema_state_dict'] = {
            f'module.{name}' if '.' in name else name: v for name, v in unaveraged.items()
        }
    return content


def _is_plain(value: Any) -> bool:
    """Whether a stored value consists of strings, numbers and plain containers only."""
    if isinstance(value, Mapping):
        return type(value) in (dict, OrderedDict) and _is_plain([*value, *value.values()])
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, bytes, bool, int, float))


def _translate(saved: Mapping, key: str | None = None) -> tuple[Contents, dict, Report]:
    """Find the weights in the content of a file, check them, and convert their names."""
    contents = find_weights(saved, key)
    state_dict, report = convert(contents.tensors)
    check_finite(contents.tensors)
    return contents, state_dict, report


def _load(
    model: nn.Module, saved: Mapping, strict: bool, new_classes: bool, key: str | None
) -> Report:
    """Load the content of a file into a model, see :func:`load_checkpoint`."""
    contents, state_dict, report = _translate(saved, key)
    report.taken, report.others = contents.key, contents.others
    own = model.state_dict()
    names = _names_in(own, state_dict)
    state_dict = {names[name]: tensor for name, tensor in state_dict.items()}
    differing = [k for k, v in state_dict.items() if k in own and own[k].shape != v.shape]
    report.resized = [name for name in differing if name.endswith(BIAS_TABLE)]
    if new_classes:
        report.other_shape = [name for name in differing if _of_head(name)]
        for name in report.other_shape:
            del state_dict[name]
    report.dropped += [k for k in state_dict if k.endswith(BIAS_TABLE) and k not in own]
    _refuse_quantized(own, state_dict)
    _refuse_other_shapes(own, state_dict, [k for k in differing if k in state_dict])
    missing, unused = model.load_state_dict(state_dict, strict=False)
    _report_unmatched(report, contents, names, missing, unused)
    report.used = len(own) - len(missing)
    if strict and (report.missing or report.unused):
        raise RuntimeError(f'the checkpoint does not match the model. {report}')
    incomplete = any(not _of_head(name) for name in report.missing)
    maybe_better = set(report.others.values()) - {SWAPPED}
    level = logging.WARNING if incomplete or maybe_better else logging.INFO
    print_log(str(report), 'current', level)
    return report


def _names_in(own: Mapping, state_dict: Mapping) -> dict[str, str]:
    """Map names to those in a model, which may be a bare backbone or wrapped."""
    plain = {plain_name(name): name for name in own}
    start = 'backbone.'
    names = {name: name for name in state_dict}
    if not any(name.startswith(start) for name in plain):
        names = {name: name.removeprefix(start) for name in state_dict}
    elif not any(name.startswith(start) for name in state_dict):
        names = {name: start + name for name in state_dict}
    return {name: plain.get(new, new) for name, new in names.items()}


def _of_head(name: str) -> bool:
    return bool(HEAD.match(plain_name(name)))


def _refuse_quantized(own: Mapping, state_dict: Mapping) -> None:
    """Refuse quantized weights: copying would treat their codes as values."""
    codes = [
        name
        for name, tensor in state_dict.items()
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point()
    ]
    if codes:
        raise RuntimeError(
            f'the checkpoint has {state_dict[codes[0]].dtype} for {codes[0]!r} and '
            f'{len(codes) - 1} more, the model has {own[codes[0]].dtype}: these weights are '
            'quantized. Save the weights of the model before quantization'
        )


def _refuse_other_shapes(own: Mapping, state_dict: Mapping, differing: list[str]) -> None:
    """Refuse tensors whose shapes do not match, before any is loaded."""
    # Bias tables are resized for another window, but not for another number of heads.
    wrong = [
        key
        for key in differing
        if not (key.endswith(BIAS_TABLE) and own[key].shape[1:] == state_dict[key].shape[1:])
    ]
    if not wrong:
        return
    remedy = 'build the model with the arch, in_channels and neck of the checkpoint'
    if all(map(_of_head, wrong)):
        remedy = (
            'set num_classes (out_channels for a pose head) to that of the checkpoint, or load '
            'with new_classes=True'
        )
    lines = [
        f'  size mismatch for {key}: {tuple(state_dict[key].shape)} in the checkpoint, '
        f'{tuple(own[key].shape)} in the model'
        for key in wrong
    ]
    raise RuntimeError(f'the checkpoint does not match the model: {remedy}\n' + '\n'.join(lines))


def _report_unmatched(
    report: Report, contents: Contents, names: Mapping, missing: list[str], unused: list[str]
) -> None:
    """Report the tensors of the model and of the file without a counterpart."""
    in_file = {new: old for old, new in names.items()}
    in_file.update((names[new], old) for old, new in report.renamed.items() if new in names)
    left = [in_file.get(name, name) for name in unused]
    left = [contents.names.get(name, name) for name in left]
    # Counters of averaged models have no module; further models have their own prefixes.
    others = tuple(f'{key}.' for key in contents.others)
    extra = [k for k in left if '.' not in plain_name(k) or plain_name(k).startswith(others)]
    report.missing = [name for name in missing if name not in report.other_shape]
    report.unused = [name for name in left if name not in extra]
    report.outside = [*contents.outside, *extra]

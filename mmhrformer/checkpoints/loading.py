"""Load a checkpoint of any dialect into a whole model."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import nn

from .dialects import BIAS_TABLE, Report, convert, unwrap
from .reading import read_checkpoint


def load_checkpoint(
    model: nn.Module, checkpoint: str | Path | MutableMapping, strict: bool = False
) -> Report:
    """Load a checkpoint of any dialect into a model built from one of our configs.

    Args:
        model (nn.Module): A classifier, pose estimator or segmentor with an HRFormer backbone, or
            a bare :class:`HRFormer`.
        checkpoint (str | Path | MutableMapping): A file, or what was saved in it.
        strict (bool): Whether a missing or unused tensor is an error. Defaults to False.

    Returns:
        Report: What became of each tensor; it is also logged.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or is of no known dialect.
        RuntimeError: If tensors do not fit, or with ``strict`` are missing or unused.

    Examples:
        >>> from mmhrformer import HRFormer
        >>> model = HRFormer(arch='tiny')
        >>> load_checkpoint(model, model.state_dict()).unused
        []
    """
    if not isinstance(checkpoint, MutableMapping):
        checkpoint = read_checkpoint(checkpoint)
    state_dict, report = convert(unwrap(checkpoint))
    names = {key: key for key in state_dict}
    if not hasattr(model, 'backbone'):
        names = {key: key.removeprefix('backbone.') for key in state_dict}
    elif not any(key.startswith('backbone.') for key in state_dict):
        names = {key: 'backbone.' + key for key in state_dict}
    state_dict = {names[key]: tensor for key, tensor in state_dict.items()}
    own = set(model.state_dict())
    report.dropped += [key for key in state_dict if key.endswith(BIAS_TABLE) and key not in own]
    missing, unused = model.load_state_dict(state_dict, strict=strict)
    in_file = {name: key for key, name in names.items()}
    in_file.update((names[new], old) for old, new in report.renamed.items() if new in names)
    report.missing, report.unused = list(missing), [in_file.get(key, key) for key in unused]
    report.used = len(own) - len(missing)
    print_log(str(report), 'current')
    return report


SCHEME = 'mmhrformer://'


@CheckpointLoader.register_scheme(prefixes=SCHEME)
def load_from_scheme(filename: str, map_location=None, logger: str = 'current') -> dict:
    """Read ``mmhrformer://PATH`` wherever mmengine takes a checkpoint.

    The file may be of any dialect and is read without running code from it; the tensors come out
    with the names they have here. Other contents of the file are left behind.

    Args:
        filename (str): ``mmhrformer://`` and the path of a file.
        map_location (optional): Tensors are always read on the CPU; models copy them from there.
        logger (str): Where to tell what was read. Defaults to ``'current'``.

    Returns:
        dict: The tensors by name, under ``'state_dict'``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or is of no known dialect.
    """
    path = filename.removeprefix(SCHEME)
    state_dict, report = convert(unwrap(read_checkpoint(path)))
    print_log(f'{path}: {report.dialect} checkpoint of {len(state_dict)} tensors', logger)
    return dict(state_dict=state_dict)

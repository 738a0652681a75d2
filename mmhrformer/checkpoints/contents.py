"""Location of a model's weights in a saved file, and removal of wrappers from their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .reading import Inert, name_of_type, save_weights

CONTAINERS = ('state_dict', 'model')
# Name components that wrappers insert, before the model or a part of it: DataParallel and averaged
# models, torch.compile, FSDP, activation checkpointing, Lightning Fabric.
WRAPPERS = frozenset(
    ('module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_forward_module')
)
_BLOCKS = re.compile(r'((?:.*\.)?)stage2\.\d+\.branches\.')
SWAPPED = "not averaged: mmengine's EMAHook saves the averaged weights as 'state_dict'"


@dataclass
class Contents:
    """Weights found in a file.

    Attributes:
        tensors (dict[str, Tensor]): The weights by name, without wrappers.
        names (dict[str, str]): Names without wrappers -> names in the file.
        key (str): Key of the file under which they are; empty at the top level.
        others (dict[str, str]): Keys, or prefixes of names, of further weights of an HRFormer, each
            with a hint at their origin, or ''.
        outside (dict[str, Tensor]): Tensors that do not belong to the model, such as those of a
            loss, by their names in the file.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str]
    key: str = ''
    others: dict[str, str] = field(default_factory=dict)
    outside: dict[str, Tensor] = field(default_factory=dict)


def find_weights(checkpoint: Mapping, key: str | None = None) -> Contents:
    """Find the weights in the content of a file, and remove wrappers from their names.

    These are a prefix of the whole model, such as Lightning's ``model.``, and the components that
    wrappers insert (``module.``, ``_orig_mod.`` and others).

    Args:
        checkpoint (Mapping): Content of the file: tensors by name, possibly under ``'state_dict'``
            or ``'model'``.
        key (str, optional): Another key, or the prefix of the weights' names. Defaults to None.

    Returns:
        Contents: The weights.

    Raises:
        ValueError: If there are no weights in the expected place, or those of several models, or if
            a weight is not a tensor.
    """
    place, holder = _holder(checkpoint, key)
    named = {name: value for name, value in holder.items() if isinstance(name, str)}
    others = _others(checkpoint, place)
    has_tensors = any(isinstance(value, Tensor) for value in named.values())
    if holder and not _has_blocks(named) and (others or not has_tensors):
        raise ValueError(_where_weights_may_be(checkpoint, others))
    names, further = _plain_names(named)
    contents = Contents({}, {}, place, {**others, **further})
    for name, value in named.items():
        if isinstance(value, Tensor) and name in names:
            contents.tensors[names[name]] = value
            contents.names[names[name]] = name
        elif isinstance(value, Tensor):
            contents.outside[name] = value
        elif name in names and '.' in name and not name.endswith('._extra_state'):
            raise ValueError(
                f'the weight {name!r} is stored as {name_of_type(value)}, not as a tensor: in the '
                'code that wrote it, convert such weights to ordinary tensors and save these by '
                'name'
            )
    return contents


def unwrap(checkpoint: Mapping, key: str | None = None) -> dict[str, Tensor]:
    """Extract the weights from the content of a saved file.

    Args:
        checkpoint (Mapping): Content of the file.
        key (str, optional): Key of the weights, or prefix of their names. Defaults to None:
            ``'state_dict'``, ``'model'`` or the top level.

    Returns:
        dict[str, Tensor]: Tensors by name.

    Raises:
        ValueError: If the file is not empty, but has no tensors in the expected place.
    """
    return find_weights(checkpoint, key).tensors


def plain_name(name: str) -> str:
    """Remove the components that wrappers inserted into a name.

    Examples:
        >>> plain_name('module.backbone._orig_mod.conv1.weight')
        'backbone.conv1.weight'
    """
    return '.'.join(part for part in name.split('.') if part not in WRAPPERS)


def _plain_names(names: Mapping) -> tuple[dict[str, str], dict[str, str]]:
    """Plain names of the model's tensors, and prefixes of further models, see Contents.others."""
    plain = {name: plain_name(name) for name in names}
    starts = {found[1] for found in map(_BLOCKS.match, plain.values()) if found}
    if not starts:  # another network, refused later by its names
        return {name: name.removeprefix('module.') for name in plain}, {}
    models = {re.sub(r'(^|\.)backbone\.$', r'\1', start) for start in starts}
    models = sorted(sorted(models), key=len)
    prefix, *further = models
    if not all(start.startswith(prefix) for start in further):
        raise ValueError(
            f'the checkpoint has the weights of several models, under {models}: choose one with '
            f'{_explain_key(prefix.rstrip("."))}'
        )
    own = {n: short.removeprefix(prefix) for n, short in plain.items() if short.startswith(prefix)}
    refuse_duplicates(own)
    return own, {start.rstrip('.'): _meaning(start) for start in further}


def refuse_duplicates(names: Mapping[str, str]) -> None:
    """Refuse different names in a file that have the same plain name."""
    first = {}
    for name, short in names.items():
        if first.setdefault(short, name) != name:
            raise ValueError(
                f'the checkpoint has {first[short]!r} and {name!r}, which are the same tensor of a '
                'model: it mixes two files. Remove one of the two and save it again'
            )


def _explain_key(key: str) -> str:
    return f'load_checkpoint(model, FILE, key={key!r}), or convert_checkpoint.py --key {key}'


def describe_other_weights(taken: str, others: Mapping[str, str]) -> Iterator[str]:
    """Describe further weights in a file and how to load them, one line each.

    Args:
        taken (str): Key of the weights that were loaded.
        others (Mapping[str, str]): As in :class:`Contents`.
    """
    place = f'under {taken!r}' if taken else 'at the top level of the file'
    for key, meaning in others.items():
        yield (
            f'  loaded: the weights {place}. There are others under {key!r}'
            f'{meaning and f" ({meaning})"}: to load those, {_explain_key(key)}'
        )


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and (bool(value) or not isinstance(value, Inert))


def _holder(checkpoint: Mapping, key: str | None) -> tuple[str, Mapping]:
    """The key of the mapping with the weights, and the mapping."""
    if key is not None and _is_mapping(checkpoint.get(key)):
        return key, _holder(checkpoint[key], None)[1]
    place, holder = '', checkpoint
    for container in CONTAINERS * 2:  # they may be nested
        if _is_mapping(holder.get(container)):
            place, holder = place or container, holder[container]
    if key is None:
        return place, holder
    start = key.rstrip('.') + '.'
    chosen = {
        name: value
        for name, value in holder.items()
        if isinstance(name, str) and plain_name(name).startswith(start)
    }
    if not chosen:
        raise ValueError(
            f'key={key!r}: the checkpoint has no weights there; its keys are {list(checkpoint)[:9]}'
            + (f'; {save_weights({key: checkpoint[key]})}' if key in checkpoint else '')
        )
    return key, chosen


def _has_blocks(named: Mapping) -> bool:
    """Whether tensors are named like those of an HRFormer or HRNet."""
    return any(_BLOCKS.match(plain_name(name)) for name in named if isinstance(name, str))


def _others(checkpoint: Mapping, taken: str) -> dict[str, str]:
    """Other keys with weights of an HRFormer, or with a whole module."""
    found = {}
    for key, value in checkpoint.items():
        if key == taken or not isinstance(key, str):
            continue
        if isinstance(value, Inert) and value.is_module:
            found[key] = f'a whole {value.stored}'
        elif _is_mapping(value) and _has_blocks(_holder(value, None)[1]):
            found[key] = _meaning(key, value)
    return found


def _meaning(key: str, value: Mapping | None = None) -> str:
    """Hint at the origin of weights, from their key; may be empty."""
    if key == 'ema_state_dict' and value and 'steps' in value:
        return SWAPPED
    return 'averaged, judging by the name' if re.search('ema|average|swa', key.lower()) else ''


def _where_weights_may_be(checkpoint: Mapping, others: Mapping[str, str]) -> str:
    key = next((key for key in others if _is_mapping(checkpoint[key])), None)
    types = sorted({value.stored for value in checkpoint.values() if isinstance(value, Inert)})
    return (
        f'the checkpoint has no tensors by name, but the keys {list(checkpoint)[:5]}'
        + (f' with {", ".join(types)}' if types else '')
        + ": tensors are expected at the top level or under 'state_dict' or 'model'; "
        + (
            save_weights(checkpoint)
            if key is None
            else f'for those under {key!r}: {_explain_key(key)}'
        )
    )


def meta_of_checkpoint(content: Mapping) -> dict:
    """Metainfo of the training data in a checkpoint, such as classes; may be empty."""
    meta = content.get('meta')
    dataset_meta = meta.get('dataset_meta') if isinstance(meta, Mapping) else None
    return dict(dataset_meta) if isinstance(dataset_meta, Mapping) else {}

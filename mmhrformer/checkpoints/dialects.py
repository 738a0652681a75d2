"""The formats of HRFormer checkpoints, called dialects here, and their conversion.

A dialect is the key mapping of a code base: how it names the parameters, and how it packs them in
its files. In all of them the backbone keeps HRNet's names (``conv1``,
``stage2.0.branches.0.0`` ...), and only the names inside a block differ; those of the heads differ
everywhere. These names identify the dialect.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from .contents import describe_other_weights, find_weights, plain_name, refuse_duplicates

BIAS_TABLE = 'relative_position_bias_table'
# Depends only on the window size. The official codes and mmpose save it; here it is computed.
DERIVED_BUFFER = 'relative_position_index'
# Here and in mmpose, query, key and value are one projection, in this order.
SEPARATE_PROJECTIONS = ('q_proj', 'k_proj', 'v_proj')
_SEPARATE = re.compile(rf'\.({"|".join(SEPARATE_PROJECTIONS)})\.')
# Components of names that occur only in other dialects.
_FOREIGN = re.compile(rf'\.(attn\.attn|mlp|[qkv]_proj|out_proj)\.|{DERIVED_BUFFER}$')


@dataclass(frozen=True)
class Dialect:
    """Names and packing of the tensors of a code base.

    Both tables hold pairs (name there, name here) and are used in both directions.

    Attributes:
        starts (tuple[tuple[str, str], ...]): Prefixes of names in whole models. The first pair that
            matches applies.
        blocks (tuple[tuple[str, str], ...]): Components of names inside transformer blocks.
        separate (bool): Whether query, key and value are three projections.
        container (str): Key of the tensors in a file.
        extra_key (str): Another key of each file, or empty.
        prefix (str): Prefix of all names in a file.
    """

    starts: tuple[tuple[str, str], ...] = ()
    blocks: tuple[tuple[str, str], ...] = ()
    separate: bool = False
    container: str = 'state_dict'
    extra_key: str = 'meta'
    prefix: str = ''


MMPOSE_BLOCKS = (('.attn.attn.', '.attn.'),)
OFFICIAL_BLOCKS = (*MMPOSE_BLOCKS, ('.mlp.', '.ffn.'), ('.out_proj.', '.proj.'))
_official = partial(Dialect, blocks=OFFICIAL_BLOCKS, separate=True)
_OCR = 'ocr_distri_head.object_context_block.'

DIALECTS = {
    'official-cls': _official(
        (
            ('incre_modules.', 'neck.0.incre_modules.'),
            ('downsamp_modules.', 'neck.0.downsamp_modules.'),
            ('final_layer.', 'neck.0.final_layer.'),
            ('classifier.', 'head.fc.'),
            ('', 'backbone.'),
        ),
        container='model',
        extra_key='',
    ),
    'official-pose': _official(
        (
            ('backbone.', 'backbone.'),
            ('keypoint_head.final_layer.', 'head.final_layer.'),
        ),
    ),
    'official-seg': _official(
        (
            ('backbone.', 'backbone.'),
            ('aux_head.0.', 'decode_head.0.conv.0.'),
            ('aux_head.1.0.', 'decode_head.0.conv.1.'),
            ('aux_head.2.', 'decode_head.0.conv_seg.'),
            ('conv3x3.0.', 'decode_head.1.bottleneck.0.'),
            ('conv3x3.1.0.', 'decode_head.1.bottleneck.1.'),
            (f'{_OCR}f_pixel.0.', 'decode_head.1.object_attention.f_pixel.0.0.'),
            (f'{_OCR}f_pixel.1.0.', 'decode_head.1.object_attention.f_pixel.0.1.'),
            (f'{_OCR}f_pixel.2.', 'decode_head.1.object_attention.f_pixel.1.0.'),
            (f'{_OCR}f_pixel.3.0.', 'decode_head.1.object_attention.f_pixel.1.1.'),
            (f'{_OCR}f_object.0.', 'decode_head.1.object_attention.f_object.0.0.'),
            (f'{_OCR}f_object.1.0.', 'decode_head.1.object_attention.f_object.0.1.'),
            (f'{_OCR}f_object.2.', 'decode_head.1.object_attention.f_object.1.0.'),
            (f'{_OCR}f_object.3.0.', 'decode_head.1.object_attention.f_object.1.1.'),
            (f'{_OCR}f_down.0.', 'decode_head.1.object_attention.f_down.0.0.'),
            (f'{_OCR}f_down.1.0.', 'decode_head.1.object_attention.f_down.0.1.'),
            (f'{_OCR}f_up.0.', 'decode_head.1.object_attention.f_up.0.0.'),
            (f'{_OCR}f_up.1.0.', 'decode_head.1.object_attention.f_up.0.1.'),
            ('ocr_distri_head.conv_bn_dropout.0.', 'decode_head.1.fuse.0.'),
            ('ocr_distri_head.conv_bn_dropout.1.0.', 'decode_head.1.fuse.1.'),
            ('cls_head.', 'decode_head.1.conv_seg.'),
        ),
        extra_key='config_dict',
        prefix='module.',
    ),
    # What the official pose and segmentation codes read as pretrained weights.
    'official-backbone': _official(container='model', extra_key=''),
    'mmpose': Dialect((('backbone.', 'backbone.'), ('head.', 'head.')), MMPOSE_BLOCKS),
    'mmhrformer': Dialect(),
}


@dataclass
class Report:
    """Report on the tensors of a checkpoint: used, renamed, resized, left over.

    Attributes:
        dialect (str): A key of :data:`DIALECTS`.
        renamed (dict[str, str]): Old names -> new names; joined tensors share one.
        joined (list[str]): Projections joined from separate query, key and value.
        dropped (list[str]): Tensors that the model does not need: derived buffers, and bias tables
            if it has no relative position bias.
        resized (list[str]): Bias tables that were learned for windows of another size.
        other_shape (list[str]): Tensors of the head that were not loaded, since the checkpoint has
            other classes.
        missing (list[str]): Tensors of the model that the checkpoint lacks.
        unused (list[str]): Tensors of the checkpoint that the model lacks, by their names in the
            file.
        outside (list[str]): Tensors of the file that do not belong to the model, by their names in
            the file: of losses, metrics, counters or another model.
        taken (str): Key of the tensors in the file; empty at the top level.
        others (dict[str, str]): Other keys, or prefixes of names, with weights of an HRFormer, each
            with a hint at their origin, or ''.
        used (int): Number of tensors of the model that were loaded.
    """

    dialect: str
    renamed: dict[str, str] = field(default_factory=dict)
    joined: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    other_shape: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    taken: str = ''
    others: dict[str, str] = field(default_factory=dict)
    used: int = 0

    def __str__(self) -> str:
        lines = [
            f'{self.dialect} checkpoint: {self.used} tensors used, {len(self.renamed)} renamed, '
            f'{len(self.joined)} joined from query, key and value, {len(self.resized)} resized, '
            f'{len(self.dropped)} dropped, {len(self.missing)} missing, {len(self.unused)} not used'
        ]
        lines += [f'  not loaded, for other classes: {key}' for key in self.other_shape]
        lines += [f'  missing in the checkpoint: {key}' for key in self.missing]
        lines += [f'  not used by the model: {key}' for key in self.unused]
        lines += [f'  outside of the model: {key}' for key in self.outside]
        return '\n'.join([*lines, *describe_other_weights(self.taken, self.others)])


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinite weights, as from a diverged training."""
    broken = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise ValueError(
            f'the checkpoint has NaN or infinite numbers in {len(broken)} of {len(tensors)} '
            f'tensors, the first ones {broken[:3]}: the training had already diverged. Use an '
            'earlier checkpoint'
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    if tensor.element_size() == 1:  # torch has no arithmetic for 8-bit floats
        tensor = tensor.float()
    # The sum is much faster and only finite if all numbers are, but may overflow.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def detect_dialect(keys: Iterable[str]) -> str:
    """Find the dialect of a checkpoint.

    Args:
        keys (Iterable[str]): Names of its tensors, as :func:`unwrap` returns them.

    Returns:
        str: A key of :data:`DIALECTS`.

    Raises:
        ValueError: If no dialect matches.
    """
    keys = list(keys)
    signs = (
        ('official-cls', r'classifier\.|incre_modules\.'),
        ('official-pose', r'keypoint_head\.'),
        ('official-seg', r'(ocr_distri_head|aux_head)\.'),
        ('official-backbone', r'(backbone\.)?stage2\..*\.attn\.attn\.q_proj\.'),
        ('mmpose', r'(backbone\.)?stage2\..*\.attn\.attn\.qkv\.'),
        ('mmhrformer', r'(backbone\.)?stage2\..*\.attn\.qkv\.'),
    )
    if any(re.search(r'stage2\..*\.attn\.', key) for key in keys):
        for dialect, sign in signs:
            if any(re.match(sign, key) for key in keys):
                return dialect
    raise ValueError(
        f'not an HRFormer checkpoint in a known format ({", ".join(DIALECTS)}): its '
        f'{len(keys)} tensors begin with {keys[:5]}. Check that it is the intended file'
    )


def convert(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Report]:
    """Convert the tensors of a checkpoint to our names.

    Args:
        state_dict (Mapping[str, Tensor]): Tensors by name, as :func:`unwrap` returns them: of a
            whole model or of a backbone.

    Returns:
        tuple[dict[str, Tensor], Report]: The tensors by their new names (with the prefix
        ``backbone.``, ``neck.0.``, ``head.``, ``decode_head.0.`` or ``decode_head.1.``, unless the
        checkpoint is of a bare backbone), and a report.

    Raises:
        ValueError: If the dialect is unknown, one of query, key and value is missing, or a tensor
            occurs by two names.
    """
    report = Report(detect_dialect(state_dict))
    return _translate(state_dict, report), report


def rename(name: str, starts: Iterable[tuple], blocks: Iterable[tuple]) -> str:
    """Rename a tensor by the two tables of a :class:`Dialect`, in either direction."""
    for old, new in starts:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if '.branches.' in name:
        for old, new in blocks:
            name = name.replace(old, new)
    return name


def _translate(state_dict: Mapping[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Rename, drop derived buffers, and join query, key and value; into a new dict."""
    starts = DIALECTS[report.dialect].starts if report.dialect else ()
    news = {}
    for old in state_dict:
        if old.endswith(DERIVED_BUFFER):
            report.dropped.append(old)
        else:  # the names of blocks in one dialect have no other meaning in the others
            news[old] = rename(old, starts, OFFICIAL_BLOCKS)
    refuse_duplicates(news)
    olds = {name: old for old, name in news.items()}
    translated = {}
    for name, old in olds.items():
        new = _SEPARATE.sub('.qkv.', name)
        if new == name:
            translated[new] = state_dict[old]
        elif new in olds:
            refuse_duplicates({olds[new]: new, old: new})
        elif new not in translated:
            translated[new] = _join(name, olds, state_dict)
            report.joined.append(new)
        if new != old:
            report.renamed[old] = new
    return translated


def _join(name: str, olds: Mapping[str, str], state_dict: Mapping[str, Tensor]) -> Tensor:
    """Join query, key and value, given the name of one of them."""
    parts = [_SEPARATE.sub(f'.{part}.', name) for part in SEPARATE_PROJECTIONS]
    for part in parts:
        if part not in olds:
            raise ValueError(
                f'the checkpoint has {olds[name]!r} without {part.rpartition(".attn.")[2]!r}: it '
                'is incomplete. Get it from its source again'
            )
    return torch.cat([state_dict[olds[part]] for part in parts])


def resize_bias_table(table: Tensor, window: int) -> Tensor:
    """Interpolate a relative position bias table for another window size.

    Bilinear without aligned corners, as the official segmentation code does for windows of 13
    and 15.

    Args:
        table (Tensor): Table of shape ((2 * w - 1)**2, heads).
        window (int): Side of the new window, in tokens.

    Returns:
        Tensor: Table of shape ((2 * window - 1)**2, heads).
    """
    old, new = 2 * window_of(table) - 1, 2 * window - 1
    image = table.T.reshape(1, -1, old, old)
    image = image.to(torch.promote_types(table.dtype, torch.float))  # older torch: no half on CPUs
    image = F.interpolate(image, size=(new, new), mode='bilinear', align_corners=False)
    return image.reshape(-1, new * new).T.contiguous().to(table.dtype)


def adapt_backbone_keys(state_dict: MutableMapping, prefix: str, backbone: nn.Module) -> None:
    """Convert a checkpoint in any dialect for a backbone that is about to load it.

    Args:
        state_dict (MutableMapping): The checkpoint; changed in place.
        prefix (str): Prefix of the backbone's tensors in it.
        backbone (nn.Module): The :class:`HRFormer`.

    Raises:
        ValueError: If there are tensors under the prefix, but none for the blocks, or if a weight
            is not a tensor.
    """
    if not prefix:
        contents = find_weights(state_dict)
        state_dict.clear()
        state_dict.update(contents.outside)
        state_dict.update((key.removeprefix('backbone.'), v) for key, v in contents.tensors.items())
    inside = [key for key in state_dict if key.startswith(prefix)]
    found = {key.removeprefix(prefix): state_dict.pop(key) for key in inside}
    if not found:
        # torch passes a submodule only the tensors under its own prefix, so it is unknown here
        # whether the others are a head without backbone or a backbone in another format.
        print_log(
            f'The checkpoint has nothing under {prefix!r}: the backbone is left unchanged. If the '
            'file is in another format, or its names have another prefix, write mmhrformer:// '
            'before its path.',
            'current',
            logging.WARNING,
        )
        return
    own = {plain_name(key): (key, tensor) for key, tensor in backbone.state_dict().items()}
    refuse_duplicates({key: plain_name(key) for key in found})
    tensors = {plain_name(key): tensor for key, tensor in found.items()}
    if any(map(_FOREIGN.search, tensors)):
        tensors = _translate(tensors, Report(''))
    _check_blocks(tensors, own)
    for key, tensor in _fit_bias_tables(tensors, own, backbone).items():
        state_dict[prefix + (own[key][0] if key in own else key)] = tensor


def _check_blocks(tensors: Mapping, own: Mapping) -> None:
    """Refuse a checkpoint without tensors for the blocks of the backbone."""
    blocks = [key for key in own if key.startswith('stage2.')]
    if not any(key in tensors for key in blocks):
        detect_dialect(tensors)
        raise ValueError(
            f'the checkpoint has no tensor for the blocks of this backbone (such as '
            f'{blocks[0]!r}): check the arch and the file'
        )


def _fit_bias_tables(tensors: dict, own: Mapping, backbone: nn.Module) -> dict:
    """Resize bias tables to the backbone's windows; drop them if it has no such bias."""
    fitted, windows, left_out = {}, set(), 0
    for key, tensor in tensors.items():
        if key.endswith(BIAS_TABLE):
            if key not in own and not backbone.with_rpe:
                left_out += 1
                continue
            if key in own and len(own[key][1]) != len(tensor):
                windows.add(window_of(tensor))
                tensor = resize_bias_table(tensor, window_of(own[key][1]))
        fitted[key] = tensor
    if windows:
        print_log(
            f'Resized relative position bias tables from windows of {sorted(windows)} to windows '
            f'of {sorted(set(backbone.window_sizes))} tokens per side (bilinear).',
            'current',
        )
    if left_out:
        print_log(
            f'with_rpe=False: {left_out} relative position bias tables not used. A model trained '
            'with them gives other results.',
            'current',
            logging.WARNING,
        )
    return fitted


def window_of(table: Tensor) -> int:
    """Side of the window, in tokens, for a bias table ((2 * window - 1)**2, heads)."""
    window = (round(len(table) ** 0.5) + 1) // 2
    if (2 * window - 1) ** 2 != len(table):
        raise ValueError(
            f'a relative position bias table has {len(table)} rows, which does not match any '
            'square window: checkpoints with other windows cannot be used'
        )
    return window

"""The names that HRFormer's tensors have in the world's checkpoints, and what they are here.

Dialects are told apart by their keys. Whatever the task, the backbone keeps HRNet's names
(``conv1``, ``stage2.0.branches.0.0`` ...), only the inside of a block is called differently;
the heads differ in all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

if TYPE_CHECKING:
    from ..models.hrformer import HRFormer

# Inside a transformer block, all dialects.
BLOCK_RENAMES = (
    (r'\.attn\.attn\.', '.attn.'),
    (r'\.mlp\.', '.ffn.'),
    (r'\.out_proj\.', '.proj.'),
)
# Query, key and value are one projection here, in this order.
SEPARATE_PROJECTIONS = ('q_proj', 'k_proj', 'v_proj')
DERIVED_BUFFER = 'relative_position_index'
BIAS_TABLE = 'relative_position_bias_table'

# Whole models: dialect -> renames from the start of the key.
HEAD_RENAMES = {
    'official-cls': (
        (r'(?=(incre_modules|downsamp_modules|final_layer)\.)', 'neck.0.'),
        (r'classifier\.', 'head.fc.'),
        (r'(?!neck\.0\.|head\.fc\.)', 'backbone.'),
    ),
    'official-pose': ((r'keypoint_head\.final_layer\.', 'head.final_layer.'),),
    'official-seg': (
        (r'aux_head\.(0|1)(\.0)?\.', r'decode_head.0.conv.\1.'),
        (r'aux_head\.2\.', 'decode_head.0.conv_seg.'),
        (r'conv3x3\.(0|1)(\.0)?\.', r'decode_head.1.bottleneck.\1.'),
        (r'cls_head\.', 'decode_head.1.conv_seg.'),
        (r'ocr_distri_head\.conv_bn_dropout\.(0|1)(\.0)?\.', r'decode_head.1.fuse.\1.'),
        (
            r'ocr_distri_head\.object_context_block\.(f_\w+)\.(0|1)(\.0)?\.',
            r'decode_head.1.object_attention.\1.0.\2.',
        ),
        (
            r'ocr_distri_head\.object_context_block\.(f_\w+)\.2\.',
            r'decode_head.1.object_attention.\1.1.0.',
        ),
        (
            r'ocr_distri_head\.object_context_block\.(f_\w+)\.3\.0\.',
            r'decode_head.1.object_attention.\1.1.1.',
        ),
    ),
    'official-backbone': (),
    'mmpose': (),
    'mmhrformer': (),
}


@dataclass
class Report:
    """What became of a checkpoint's keys.

    Attributes:
        dialect (str): A key of :data:`HEAD_RENAMES`.
        renamed (dict[str, str]): Old name to new name.
        joined (list[str]): Projections put together from separate query, key and value.
        dropped (list[str]): What the model has no use for: derived buffers, and bias tables if it
            has no relative position bias.
        missing (list[str]): Tensors of the model that the checkpoint does not have.
        unused (list[str]): Tensors of the checkpoint, by their names there, that the model does
            not have.
        used (int): Number of tensors of the model that were loaded.
    """

    dialect: str
    renamed: dict[str, str] = field(default_factory=dict)
    joined: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    used: int = 0

    def __str__(self) -> str:
        lines = [
            f'{self.dialect} checkpoint: {self.used} tensors used, {len(self.renamed)} renamed, '
            f'{len(self.joined)} joined from query, key and value, {len(self.dropped)} dropped, '
            f'{len(self.missing)} missing, {len(self.unused)} not used'
        ]
        lines += [f'  missing in the checkpoint: {key}' for key in self.missing]
        lines += [f'  not used by the model: {key}' for key in self.unused]
        return '\n'.join(lines)


def unwrap(checkpoint: MutableMapping) -> dict[str, Tensor]:
    """Take the tensors out of the wrappings of a saved file.

    Args:
        checkpoint (MutableMapping): What was saved: tensors by name, perhaps under ``'model'``
            or ``'state_dict'``, perhaps with the ``module.`` of a distributed run before each
            name.

    Returns:
        dict[str, Tensor]: Tensors by name.
    """
    for container in ('state_dict', 'model'):
        if isinstance(checkpoint.get(container), MutableMapping):
            checkpoint = checkpoint[container]
    return {
        key.removeprefix('module.'): value
        for key, value in checkpoint.items()
        if isinstance(value, Tensor)
    }


def detect_dialect(keys: Iterable[str]) -> str:
    """Tell which code wrote a checkpoint.

    Args:
        keys (Iterable[str]): Names of its tensors, as :func:`unwrap` returns them.

    Returns:
        str: A key of :data:`HEAD_RENAMES`.

    Raises:
        ValueError: If it is none that is known.
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
        f'this is no HRFormer checkpoint of a known dialect ({", ".join(HEAD_RENAMES)}): its '
        f'{len(keys)} tensors begin with {keys[:5]}. Check that it is the file you mean'
    )


def convert(state_dict: MutableMapping[str, Tensor]) -> tuple[dict[str, Tensor], Report]:
    """Give the tensors of a checkpoint the names they have here.

    Args:
        state_dict (MutableMapping[str, Tensor]): Tensors by name, as :func:`unwrap` returns
            them: of a whole model or of a backbone.

    Returns:
        tuple[dict[str, Tensor], Report]: The tensors by their new names (``backbone.``,
        ``neck.0.``, ``head.`` or ``decode_head.0.`` and ``.1.`` first, unless the checkpoint is
        of a bare backbone), and what was done.

    Raises:
        ValueError: If the dialect is unknown.
    """
    report = Report(detect_dialect(state_dict))
    return _translate(state_dict, report), report


def _new_name(name: str, dialect: str) -> str:
    for pattern, replacement in HEAD_RENAMES.get(dialect, ()):
        name = re.sub('^' + pattern, replacement, name)
    if '.branches.' in name:
        for pattern, replacement in BLOCK_RENAMES:
            name = re.sub(pattern, replacement, name)
    return name


def _translate(state_dict: MutableMapping[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Rename, drop derived buffers, and join query, key and value; into a new dict."""
    translated = {}
    for old, tensor in state_dict.items():
        if old.endswith(DERIVED_BUFFER):
            report.dropped.append(old)
            continue
        new = _new_name(old, report.dialect)
        translated[new] = tensor
        if new != old:
            report.renamed[old] = new
    first, *others = SEPARATE_PROJECTIONS
    for query in [key for key in translated if f'.{first}.' in key]:
        parts = [query, *(query.replace(first, other) for other in others)]
        joined = query.replace(first, 'qkv')
        translated[joined] = torch.cat([translated.pop(part) for part in parts])
        report.joined.append(joined)
    return translated


def resize_bias_table(table: Tensor, window: int) -> Tensor:
    """Interpolate a relative position bias table for another window.

    Bilinear without aligned corners, as the official segmentation code does for windows of 13
    and 15.

    Args:
        table (Tensor): Table of shape ((2 * w - 1)**2, heads).
        window (int): The other window's side, in tokens.

    Returns:
        Tensor: Table of shape ((2 * window - 1)**2, heads).
    """
    old, new = round(len(table) ** 0.5), 2 * window - 1
    image = table.T.reshape(1, -1, old, old)
    image = F.interpolate(image, size=(new, new), mode='bilinear', align_corners=False)
    return image.reshape(-1, new * new).T.contiguous()


def adapt_backbone_keys(state_dict: MutableMapping, prefix: str, backbone: HRFormer) -> None:
    """Make a checkpoint of any dialect fit a backbone that is about to load it.

    Args:
        state_dict (MutableMapping): The checkpoint; changed in place.
        prefix (str): What the names of the backbone's tensors begin with in it.
        backbone (HRFormer): The backbone.

    Raises:
        ValueError: If there are tensors under the prefix, but none for the blocks.
    """
    if not prefix:
        tensors = unwrap(state_dict)
        state_dict.clear()
        state_dict.update({key.removeprefix('backbone.'): v for key, v in tensors.items()})
    found = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    if not found:
        return
    own = {prefix + key: tensor for key, tensor in backbone.state_dict().items()}
    tensors = _translate(found, Report(''))
    _check_blocks(tensors, own, prefix)
    state_dict.update(_fit_bias_tables(tensors, own, backbone))


def _check_blocks(tensors: MutableMapping, own: MutableMapping, prefix: str) -> None:
    """Refuse a checkpoint that has nothing for the blocks of the backbone."""
    blocks = [key for key in own if key.startswith(f'{prefix}stage2.')]
    if not any(key in tensors for key in blocks):
        detect_dialect(key.removeprefix(prefix) for key in tensors)
        raise ValueError(
            f'the checkpoint has no tensor for the blocks of this backbone (such as '
            f'{blocks[0]!r}): check arch and file'
        )


def _fit_bias_tables(tensors: dict, own: MutableMapping, backbone: HRFormer) -> dict:
    """Resize bias tables to the backbone's windows; leave them out if it has none."""
    fitted, windows, left_out = {}, set(), 0
    for key, tensor in tensors.items():
        if key.endswith(BIAS_TABLE):
            if key not in own and not backbone.with_rpe:
                left_out += 1
                continue
            if key in own and len(own[key]) != len(tensor):
                windows.add(_window_of(tensor))
                tensor = resize_bias_table(tensor, _window_of(own[key]))
        fitted[key] = tensor
    if windows:
        print_log(
            f'Resized relative position bias tables, learned for windows of {sorted(windows)} '
            f'tokens a side, to windows of {sorted(set(backbone.window_sizes))} (bilinear).',
            'current',
        )
    if left_out:
        print_log(f'with_rpe=False: {left_out} relative position tables not used.', 'current')
    return fitted


def _window_of(table: Tensor) -> int:
    return (round(len(table) ** 0.5) + 1) // 2

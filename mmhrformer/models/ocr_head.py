"""Object-contextual representations (OCR) for mmseg's CascadeEncoderDecoder.

Unlike in mmseg's own OCR head, convolutions before batch normalization have a bias, as in the
official segmentation checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from mmcv.cnn import build_activation_layer, build_conv_layer, build_norm_layer
from mmengine.model import Sequential
from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from ..ops.state import modes
from ..registry import MODELS
from .checks import (
    as_indices,
    check_flags,
    check_norm_cfg,
    check_positive_int,
    check_probability,
    is_integer,
)


def conv_norm_act(
    head: BaseDecodeHead, in_channels: int, out_channels: int, kernel_size: int = 1, groups: int = 1
) -> Sequential:
    """Convolution with bias, followed by the head's normalization and activation, if any."""
    options = dict(padding=kernel_size // 2, groups=groups)
    layers = [build_conv_layer(head.conv_cfg, in_channels, out_channels, kernel_size, **options)]
    if head.norm_cfg is not None:
        layers.append(build_norm_layer(head.norm_cfg, out_channels)[1])
    if head.act_cfg is not None:
        layers.append(build_activation_layer(head.act_cfg))
    return Sequential(*layers)


def base_options(kind: type, options: dict) -> dict:
    """Convert arguments of a head to what mmseg's ``BaseDecodeHead`` accepts: plain numbers."""
    outputs = {name: options.get(name) for name in ('num_classes', 'out_channels')}
    if outputs['out_channels'] is None:
        # Set explicitly: otherwise mmseg warns that two classes need only one channel.
        outputs['out_channels'] = outputs['num_classes']
    if 1 in outputs.values():
        given = ', '.join(f'{name}={count}' for name, count in outputs.items())
        raise ValueError(
            f'{kind.__name__}: {given}: OCR compares the regions of classes, which takes at least '
            'two channels: use num_classes=2 (background and foreground) without out_channels '
            'and threshold, in both heads'
        )
    inputs = {name: options[name] for name in ('in_channels', 'in_index') if name in options}
    plain = {name: as_indices(value) for name, value in inputs.items()}
    several = options.get('input_transform') is not None
    is_mixed = any(bool(np.ndim(value)) != several for value in inputs.values())
    if is_mixed or len({len(values) for values in plain.values()}) > 1:
        given = ', '.join(f'{name}={value!r}' for name, value in inputs.items())
        raise ValueError(
            f'{kind.__name__}: {given}: expected lists of equal length with '
            "input_transform='resize_concat', or one number each without input_transform"
        )
    plain = {name: values if several else values[0] for name, values in plain.items()}
    return {**options, **plain, 'out_channels': outputs['out_channels']}


def check_options(head: BaseDecodeHead, kernel_size: int, groups: int, **channels: int) -> None:
    """Refuse options that mmseg accepts silently or fails on later.

    ``channels`` are numbers of channels, by argument name.
    """
    channels['channels'] = head.channels
    for name, value in dict(channels, num_classes=head.num_classes).items():
        check_positive_int(name, value)
    if not is_integer(kernel_size, 1) or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size={kernel_size!r}: expected an odd number, such as 3')
    if head.input_transform == 'multiple_select':
        raise ValueError(
            "input_transform='multiple_select': choose 'resize_concat' for several streams, or "
            'None for one'
        )
    if not is_integer(groups, 1) or head.in_channels % groups or head.channels % groups:
        raise ValueError(
            f'groups={groups!r}: expected a number that divides the {head.in_channels} channels of '
            f'the streams and channels={head.channels}'
        )
    check_probability('dropout_ratio', head.dropout_ratio)
    check_flags(align_corners=head.align_corners)
    if head.norm_cfg is not None:
        check_norm_cfg(head.norm_cfg, channels.values())
    for name, cfg in dict(act_cfg=head.act_cfg, conv_cfg=head.conv_cfg).items():
        if cfg is not None and not (isinstance(cfg, Mapping) and 'type' in cfg):
            raise ValueError(f'{name}={cfg!r}: expected a config, dict(type=...), or None')


def select_inputs(head: BaseDecodeHead, inputs: Sequence[Tensor]) -> Tensor:
    """Resize the streams of a head to one size, and concatenate them to (B, in_channels, H, W)."""
    name = type(head).__name__
    indices = [head.in_index] if isinstance(head.in_index, int) else head.in_index
    if not all(-len(inputs) <= index < len(inputs) for index in indices):
        raise ValueError(
            f'{name} got {len(inputs)} streams, but in_index is {head.in_index}: set in_index or '
            "the backbone's out_indices so that each index has a stream"
        )
    x = head._transform_inputs(inputs)
    if x.shape[1] != head.in_channels:
        raise ValueError(
            f'{name} got streams of {[x.shape[1] for x in inputs]} channels, but in_channels is '
            f'{head.in_channels} in total for in_index={head.in_index}: set in_channels to the '
            "channels of the backbone's streams"
        )
    return x


class ObjectAttention(nn.Module):
    """Attention of pixels to object regions, with ``key_channels`` channels."""

    def __init__(self, head: BaseDecodeHead, channels: int, key_channels: int) -> None:
        super().__init__()
        self.scale = key_channels**-0.5
        down, same = (head, channels, key_channels), (head, key_channels, key_channels)
        self.f_pixel = Sequential(conv_norm_act(*down), conv_norm_act(*same))
        self.f_object = Sequential(conv_norm_act(*down), conv_norm_act(*same))
        self.f_down = Sequential(conv_norm_act(*down))
        self.f_up = Sequential(conv_norm_act(head, key_channels, channels))

    def forward(self, pixels: Tensor, regions: Tensor) -> Tensor:
        """Compute the object context of each pixel, a weighted sum of region features.

        Args:
            pixels (Tensor): Pixel features of shape (B, C, H, W).
            regions (Tensor): Region features of shape (B, C, classes, 1).

        Returns:
            Tensor: Object context of shape (B, C, H, W).
        """
        query = self.f_pixel(pixels).flatten(2).transpose(1, 2)  # (B, H * W, K)
        key = self.f_object(regions).flatten(2)  # (B, K, classes)
        value = self.f_down(regions).flatten(2).transpose(1, 2)  # (B, classes, K)
        relation = (query @ key * self.scale).softmax(-1)  # (B, H * W, classes)
        context = (relation @ value).transpose(1, 2)  # (B, K, H * W)
        # Not unflatten, which exporters to old opsets, such as mmdeploy's, do not support.
        return self.f_up(context.reshape(*context.shape[:2], *pixels.shape[-2:]))


@MODELS.register_module()
class OCRHead(BaseCascadeDecodeHead):
    """The OCR head of the official HRFormer segmentation code.

    It is the second head of a ``CascadeEncoderDecoder``, after :class:`OCRAuxHead`, whose logits
    define the region of each class. The defaults are the official "v2"; "v3" has
    ``kernel_size=7`` and as many ``groups`` as divide both numbers of channels, in both heads.

    Args:
        ocr_channels (int): Channels of queries, keys and values. Defaults to 256 (official).
        kernel_size (int): Side of the kernel of the first convolution. Defaults to 3.
        groups (int): Groups of the first convolution. Defaults to 1.
        norm_cfg (dict, optional): Config of the normalization; None for none. Defaults to
            ``dict(type='BN')``.
        dropout_ratio (float): Channel dropout before the classifier. Defaults to 0.05
            (official).
        align_corners (bool): How maps are resized. Defaults to True (official).
        **kwargs: Arguments of mmseg's ``BaseDecodeHead``; ``channels`` is 512 officially.
    """

    def __init__(
        self,
        ocr_channels: int = 256,
        kernel_size: int = 3,
        groups: int = 1,
        norm_cfg: dict | None = dict(type='BN'),
        dropout_ratio: float = 0.05,
        align_corners: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(
            norm_cfg=norm_cfg,
            dropout_ratio=dropout_ratio,
            align_corners=align_corners,
            **base_options(type(self), kwargs),
        )
        check_options(self, kernel_size, groups, ocr_channels=ocr_channels)
        self.bottleneck = conv_norm_act(self, self.in_channels, self.channels, kernel_size, groups)
        self.object_attention = ObjectAttention(self, self.channels, ocr_channels)
        self.fuse = conv_norm_act(self, 2 * self.channels, self.channels)

    def forward(self, inputs: Sequence[Tensor], prev_output: Tensor) -> Tensor:
        """Classify pixels by their features and by their object context.

        Args:
            inputs (Sequence[Tensor]): Streams of the backbone.
            prev_output (Tensor): Logits of the auxiliary head, of shape (B, classes, H, W).

        Returns:
            Tensor: Logits of shape (B, classes, H, W).
        """
        pixels = self.bottleneck(select_inputs(self, inputs))  # (B, C, H, W)
        regions = self.gather_regions(pixels, prev_output)
        context = self.object_attention(pixels, regions)
        return self.cls_seg(self.fuse(torch.cat([context, pixels], 1)))

    @staticmethod
    def gather_regions(pixels: Tensor, logits: Tensor) -> Tensor:
        """Average pixel features for each class, weighted by a softmax over all positions.

        Args:
            pixels (Tensor): Pixel features of shape (B, C, H, W).
            logits (Tensor): Class scores of shape (B, classes, H, W).

        Returns:
            Tensor: Region features of shape (B, C, classes, 1).
        """
        weights = logits.flatten(2).softmax(-1)  # (B, classes, H * W)
        regions = weights @ pixels.flatten(2).transpose(1, 2)  # (B, classes, C)
        return regions.transpose(1, 2).unsqueeze(-1)


def origin_of(head: nn.Module, inputs: Sequence[Tensor]) -> tuple[list, list]:
    """Fingerprint of everything that the logits of a head depend on.

    Returns:
        tuple[list, list]: Modes, and the ids and versions of tensors, for comparison; and the
        tensors themselves, to be kept alive so that their ids are not reused.
    """
    tensors = [*inputs, *head.parameters(), *head.buffers()]
    versions = [(id(x), None if x.is_inference() else x._version) for x in tensors]
    return [head.training, *modes(), *versions], tensors


class StepLosses(dict):
    """Losses of a training step, together with their logits and the origin of the logits.

    The backward pass drops the logits. ``origin`` is the result of :func:`origin_of`.
    """

    def __init__(self, losses: dict, logits: Tensor, origin: tuple[list, list]) -> None:
        super().__init__(losses)
        self.logits, self.origin = logits, origin
        if logits.requires_grad:
            me = ref(self)
            logits.register_hook(lambda grad: me() and me().forget())

    def forget(self) -> None:
        """Drop everything but the losses."""
        self.logits, self.origin = None, ([], [])


# Losses from the last call of `loss` of each auxiliary head, as long as the caller keeps them.
_LOSSES: WeakKeyDictionary[nn.Module, ref[StepLosses]] = WeakKeyDictionary()


@torch.compiler.disable
def take_logits(head: nn.Module, inputs: Sequence[Tensor]) -> Tensor | None:
    """Logits (B, classes, H, W) of the last losses of a head, once, if for these inputs."""
    losses = _LOSSES.pop(head, lambda: None)()
    is_same = losses is not None and losses.origin[0] == origin_of(head, inputs)[0]
    return losses.logits if is_same else None


@MODELS.register_module()
class OCRAuxHead(BaseDecodeHead):
    """The auxiliary head before :class:`OCRHead`: convolution and classifier.

    mmseg's ``CascadeEncoderDecoder`` runs its first head twice in a training step, in ``loss`` and
    in ``forward``, which would update the statistics of batch normalization twice and take a tenth
    of the step's time. To avoid that, the losses that ``loss`` returns carry the logits. As long as
    the losses are alive and nothing that the logits depend on has changed, the next ``forward``
    returns these logits.

    Args:
        kernel_size (int): Side of the kernel of the convolution. Defaults to 3.
        groups (int): Groups of the convolution. Defaults to 1.
        norm_cfg (dict, optional): Config of the normalization; None for none. Defaults to
            ``dict(type='BN')``.
        dropout_ratio (float): Channel dropout before the classifier. Defaults to 0 (official).
        align_corners (bool): How maps are resized. Defaults to True (official).
        **kwargs: Arguments of mmseg's ``BaseDecodeHead``; ``channels`` is 512 officially.
    """

    def __init__(
        self,
        kernel_size: int = 3,
        groups: int = 1,
        norm_cfg: dict | None = dict(type='BN'),
        dropout_ratio: float = 0.0,
        align_corners: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(
            norm_cfg=norm_cfg,
            dropout_ratio=dropout_ratio,
            align_corners=align_corners,
            **base_options(type(self), kwargs),
        )
        check_options(self, kernel_size, groups)
        self.conv = conv_norm_act(self, self.in_channels, self.channels, kernel_size, groups)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Classify pixels.

        Args:
            inputs (Sequence[Tensor]): Streams of the backbone.

        Returns:
            Tensor: Logits of shape (B, classes, H, W).
        """
        logits = take_logits(self, inputs) if self.training else None
        if logits is not None:
            return logits
        return self.cls_seg(self.conv(select_inputs(self, inputs)))

    @torch.compiler.disable  # compiled code does not keep what is compared
    def loss(self, inputs: Sequence[Tensor], batch_data_samples: list, train_cfg: dict) -> dict:
        """Compute the losses, see mmseg's ``BaseDecodeHead``; the result carries the logits."""
        _LOSSES.pop(self, None)
        logits = self.forward(inputs)
        losses = self.loss_by_feat(logits, batch_data_samples)
        if self.training:
            losses = StepLosses(losses, logits, origin_of(self, inputs))
            _LOSSES[self] = ref(losses)
        return losses

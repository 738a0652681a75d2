"""Object-contextual representations (OCR) for mmseg's CascadeEncoderDecoder.

Unlike mmseg's own OCR head, convolutions keep their bias in front of batch normalization: the
official segmentation checkpoints have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
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
from .checks import as_indices, check_norm_cfg


def conv_norm_act(
    head: BaseDecodeHead, in_channels: int, out_channels: int, kernel_size: int = 1, groups: int = 1
) -> Sequential:
    """Convolution with bias, and the normalization and activation of a head, if it has any."""
    options = dict(padding=kernel_size // 2, groups=groups)
    layers = [build_conv_layer(head.conv_cfg, in_channels, out_channels, kernel_size, **options)]
    if head.norm_cfg is not None:
        layers.append(build_norm_layer(head.norm_cfg, out_channels)[1])
    if head.act_cfg is not None:
        layers.append(build_activation_layer(head.act_cfg))
    return Sequential(*layers)


def base_options(kind: type, options: dict) -> dict:
    """Bring the arguments of mmseg's ``BaseDecodeHead`` into the form that it takes.

    Args:
        kind (type): The head.
        options (dict): The arguments; it stays as it is.

    Returns:
        dict: The arguments, with plain lists of plain numbers, and with ``out_channels``.

    Raises:
        ValueError: If the head is to have one channel, or its inputs are described in parts.
    """
    options = dict(options)
    if 'num_classes' in options and options.get('out_channels') is None:
        # Said, since mmseg advises one channel for two classes otherwise.
        options['out_channels'] = options['num_classes']
    counts = {name: options.get(name) for name in ('num_classes', 'out_channels')}
    if 1 in counts.values():
        told = ', '.join(f'{name}={count}' for name, count in counts.items())
        raise ValueError(
            f'{kind.__name__}: {told}: OCR compares the regions of classes, which takes two '
            'channels at least: use num_classes=2 (background and foreground) without '
            'out_channels and threshold, in both heads'
        )
    given = {name: options[name] for name in ('in_channels', 'in_index') if name in options}
    plain = {name: as_indices(value) for name, value in given.items()}
    several = options.get('input_transform') is not None
    if (
        any(bool(np.ndim(value)) != several for value in given.values())
        or len({len(values) for values in plain.values()}) > 1
    ):
        told = ', '.join(f'{name}={value!r}' for name, value in given.items())
        raise ValueError(
            f"{kind.__name__}: {told}: with input_transform='resize_concat' give lists of equal "
            'lengths, without input_transform one number each'
        )
    options.update({n: v if several else v[0] for n, v in plain.items()})
    return options


def check_options(head: BaseDecodeHead, kernel_size: int, groups: int, **channels: int) -> None:
    """Refuse what mmseg builds without a word, or fails at later.

    Args:
        head (BaseDecodeHead): The head.
        kernel_size (int): Side of the kernel of the first convolution.
        groups (int): Groups of the first convolution.
        **channels (int): Numbers of channels, by the names of the arguments.

    Raises:
        ValueError: If an argument is not possible.
    """
    channels = dict(channels, channels=head.channels)
    for name, value in dict(channels, num_classes=head.num_classes).items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f'{name}={value!r}: give a whole number of at least 1')
    if not isinstance(kernel_size, Integral) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size={kernel_size!r}: give an odd number, such as 3')
    if head.input_transform == 'multiple_select':
        raise ValueError(
            "input_transform='multiple_select': choose 'resize_concat' for several streams, or "
            'None for one'
        )
    divided = isinstance(groups, Integral) and groups >= 1
    if not divided or head.in_channels % groups or head.channels % groups:
        raise ValueError(
            f'groups={groups!r}: give a number that divides the {head.in_channels} channels of the '
            f'streams and channels={head.channels}'
        )
    if not 0 <= head.dropout_ratio < 1:
        raise ValueError(f'dropout_ratio={head.dropout_ratio}: choose a number in [0, 1)')
    if head.norm_cfg is not None:
        check_norm_cfg(head.norm_cfg, channels.values())
    for name in ('act_cfg', 'conv_cfg'):
        cfg = getattr(head, name)
        if cfg is not None and not (isinstance(cfg, Mapping) and 'type' in cfg):
            raise ValueError(f'{name}={cfg!r}: give a config, dict(type=...), or None')


def select_inputs(head: BaseDecodeHead, inputs: Sequence[Tensor]) -> Tensor:
    """Bring the streams that a head uses to one size and put them together.

    Args:
        head (BaseDecodeHead): The head.
        inputs (Sequence[Tensor]): Streams of the backbone.

    Returns:
        Tensor: Map of shape (B, in_channels, H, W).

    Raises:
        ValueError: If the streams are not those that the head was made for.
    """
    indices = [head.in_index] if isinstance(head.in_index, int) else head.in_index
    if not all(-len(inputs) <= index < len(inputs) for index in indices):
        raise ValueError(
            f'{type(head).__name__} got {len(inputs)} streams, in_index is {head.in_index}: set '
            "in_index, or the backbone's out_indices, so that each index has a stream"
        )
    x = head._transform_inputs(inputs)
    if x.shape[1] != head.in_channels:
        raise ValueError(
            f'{type(head).__name__} got streams of {[x.shape[1] for x in inputs]} channels, '
            f'in_channels is {head.in_channels} in all for in_index={head.in_index}: set '
            "in_channels to the channels of the backbone's streams"
        )
    return x


class ObjectAttention(nn.Module):
    """Attention of pixels to the representations of the object regions.

    Args:
        head (BaseDecodeHead): The head, which says the kinds of layers.
        channels (int): Channels of pixels and regions.
        key_channels (int): Channels of queries, keys and values.
    """

    def __init__(self, head: BaseDecodeHead, channels: int, key_channels: int) -> None:
        super().__init__()
        self.scale = key_channels**-0.5
        self.f_pixel = Sequential(
            conv_norm_act(head, channels, key_channels),
            conv_norm_act(head, key_channels, key_channels),
        )
        self.f_object = Sequential(
            conv_norm_act(head, channels, key_channels),
            conv_norm_act(head, key_channels, key_channels),
        )
        self.f_down = Sequential(conv_norm_act(head, channels, key_channels))
        self.f_up = Sequential(conv_norm_act(head, key_channels, channels))

    def forward(self, pixels: Tensor, regions: Tensor) -> Tensor:
        """Gather for each pixel what the regions tell about it.

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
        # Not unflatten, for exporters that write old opsets, such as mmdeploy's.
        return self.f_up(context.reshape(*context.shape[:2], *pixels.shape[-2:]))


@MODELS.register_module()
class OCRHead(BaseCascadeDecodeHead):
    """The OCR head of the official HRFormer segmentation code.

    Comes second in a ``CascadeEncoderDecoder``, after :class:`OCRAuxHead`, whose logits tell
    which pixels make up the region of each class. The defaults are the official "v2"; "v3" has
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
    """All that decides about what a head computes, to find out whether it is the same again.

    Args:
        head (nn.Module): The head.
        inputs (Sequence[Tensor]): Its inputs.

    Returns:
        tuple[list, list]: What to compare, modes and the identities and versions of tensors; and
        the tensors, to be held so that no others get their identities.
    """
    tensors = [*inputs, *head.parameters(), *head.buffers()]
    versions = [(id(x), None if x.is_inference() else x._version) for x in tensors]
    return [head.training, *modes(), *versions], tensors


class StepLosses(dict):
    """Losses of a training step, with the logits that they were computed from.

    Args:
        losses (dict): The losses.
        logits (Tensor): The logits; forgotten when the backward pass comes to them.
        origin (tuple[list, list]): See :func:`origin_of`.
    """

    def __init__(self, losses: dict, logits: Tensor, origin: tuple[list, list]) -> None:
        super().__init__(losses)
        self.logits, self.origin = logits, origin
        if logits.requires_grad:
            me = ref(self)
            logits.register_hook(lambda grad: me() and me().forget())

    def forget(self) -> None:
        """Keep nothing but the losses."""
        self.logits, self.origin = None, ([], [])


# Of each auxiliary head, the losses that its last `loss` returned, for as long as they are held.
_LOSSES: WeakKeyDictionary[nn.Module, ref[StepLosses]] = WeakKeyDictionary()


@MODELS.register_module()
class OCRAuxHead(BaseDecodeHead):
    """The auxiliary head in front of :class:`OCRHead`: convolution and classifier.

    mmseg's ``CascadeEncoderDecoder`` runs its first head twice in a training step, in ``loss`` and
    in ``forward``, which would update the statistics of batch normalization twice and cost a tenth
    of the step. Neither call is told of the other; what belongs to the step, and ends with it, are
    the losses that the first one returns. They carry the logits, and while they are held and
    nothing has changed on which the logits depend, the next ``forward`` gives these logits.

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
        losses = _LOSSES.pop(self, lambda: None)() if self.training else None
        if losses is not None and losses.origin[0] == origin_of(self, inputs)[0]:
            return losses.logits
        return self.cls_seg(self.conv(select_inputs(self, inputs)))

    def loss(self, inputs: Sequence[Tensor], batch_data_samples: list, train_cfg: dict) -> dict:
        """Compute the losses, see mmseg's ``BaseDecodeHead``; they carry the logits."""
        _LOSSES.pop(self, None)
        logits = self.forward(inputs)
        losses = self.loss_by_feat(logits, batch_data_samples)
        if self.training:
            losses = StepLosses(losses, logits, origin_of(self, inputs))
            _LOSSES[self] = ref(losses)
        return losses

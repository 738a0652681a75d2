"""Object-contextual representations (OCR) for mmseg's CascadeEncoderDecoder.

Unlike mmseg's own OCR head, convolutions keep their bias in front of batch normalization: the
official segmentation checkpoints have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from mmcv.cnn import build_activation_layer, build_conv_layer, build_norm_layer
from mmengine.model import Sequential
from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from ..registry import MODELS


def conv_norm_act(
    head: BaseDecodeHead, in_channels: int, out_channels: int, kernel_size: int = 1, groups: int = 1
) -> Sequential:
    """Convolution with bias, normalization and activation of the kinds that a head uses."""
    options = dict(padding=kernel_size // 2, groups=groups)
    return Sequential(
        build_conv_layer(head.conv_cfg, in_channels, out_channels, kernel_size, **options),
        build_norm_layer(head.norm_cfg, out_channels)[1],
        build_activation_layer(head.act_cfg),
    )


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
    for name, value in dict(channels, channels=head.channels, num_classes=head.num_classes).items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f'{name}={value!r}: give a whole number of at least 1')
    if not isinstance(kernel_size, Integral) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size={kernel_size!r}: give an odd number, such as 3')
    divided = isinstance(groups, Integral) and groups >= 1
    if not divided or head.in_channels % groups or head.channels % groups:
        raise ValueError(
            f'groups={groups!r}: give a number that divides the {head.in_channels} channels of the '
            f'streams and channels={head.channels}'
        )
    if not 0 <= head.dropout_ratio < 1:
        raise ValueError(f'dropout_ratio={head.dropout_ratio}: choose a number in [0, 1)')


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
    last = head.in_index if isinstance(head.in_index, Integral) else max(head.in_index)
    if last >= len(inputs):
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
        norm_cfg (dict): Config of the normalization. Defaults to ``dict(type='BN')``.
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
        norm_cfg: dict = dict(type='BN'),
        dropout_ratio: float = 0.05,
        align_corners: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(
            norm_cfg=norm_cfg, dropout_ratio=dropout_ratio, align_corners=align_corners, **kwargs
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


@MODELS.register_module()
class OCRAuxHead(BaseDecodeHead):
    """The auxiliary head in front of :class:`OCRHead`: convolution and classifier.

    mmseg's ``CascadeEncoderDecoder`` runs its first head twice in a training step, once for the
    loss and once for the second head, which would update the statistics of batch normalization
    twice. This head hands the logits of the loss to the second run, so it computes once.

    Args:
        kernel_size (int): Side of the kernel of the convolution. Defaults to 3.
        groups (int): Groups of the convolution. Defaults to 1.
        norm_cfg (dict): Config of the normalization. Defaults to ``dict(type='BN')``.
        dropout_ratio (float): Channel dropout before the classifier. Defaults to 0 (official).
        align_corners (bool): How maps are resized. Defaults to True (official).
        **kwargs: Arguments of mmseg's ``BaseDecodeHead``; ``channels`` is 512 officially.
    """

    def __init__(
        self,
        kernel_size: int = 3,
        groups: int = 1,
        norm_cfg: dict = dict(type='BN'),
        dropout_ratio: float = 0.0,
        align_corners: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(
            norm_cfg=norm_cfg, dropout_ratio=dropout_ratio, align_corners=align_corners, **kwargs
        )
        check_options(self, kernel_size, groups)
        self.conv = conv_norm_act(self, self.in_channels, self.channels, kernel_size, groups)
        self._kept: tuple[Sequence[Tensor], Tensor] | None = None

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Classify pixels.

        Args:
            inputs (Sequence[Tensor]): Streams of the backbone.

        Returns:
            Tensor: Logits of shape (B, classes, H, W).
        """
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] is inputs:
            return kept[1]
        return self.cls_seg(self.conv(select_inputs(self, inputs)))

    def loss(self, inputs: Sequence[Tensor], batch_data_samples: list, train_cfg: dict) -> dict:
        """Compute the losses, see mmseg's ``BaseDecodeHead``, and keep the logits."""
        logits = self.forward(inputs)
        self._kept = (inputs, logits)
        return self.loss_by_feat(logits, batch_data_samples)

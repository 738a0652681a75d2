"""The classification neck of HRFormer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..registry import MODELS
from .block import Bottleneck
from .checks import check_neck, check_norm_cfg
from .ffn import DepthwiseConv2d


@MODELS.register_module()
class HRFormerFusion(BaseModule):
    """Sum of four streams in one map, for classification.

    Each stream is widened by a bottleneck with a depth-wise 3x3 convolution. Starting with the
    finest stream, the sum is halved in size, doubled in channels and added to the next stream; a
    1x1 convolution widens the final sum. This is HRNet's classification head with depth-wise
    convolutions, as in the official code.

    Args:
        in_channels (Sequence[int]): Channels of the four streams, finest first.
        mid_channels (Sequence[int]): Channels of the bottlenecks; each stream leaves its
            bottleneck with four times as many. Defaults to (32, 64, 128, 256).
        out_channels (int): Channels of the map. Defaults to 2048.
        norm_cfg (dict): Config of the normalization. Defaults to ``dict(type='BN')``.
        init_cfg (dict, optional): Initialization config of mmengine.

    Raises:
        ValueError: If ``in_channels`` and ``mid_channels`` differ in length, or a number of
            channels or the normalization is invalid.

    Examples:
        >>> import torch
        >>> neck = HRFormerFusion(in_channels=(18, 36, 72, 144))
        >>> xs = [torch.rand(1, 18 * 2**i, 56 // 2**i, 56 // 2**i) for i in range(4)]
        >>> [x.shape for x in neck(xs)]
        [torch.Size([1, 2048, 7, 7])]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        mid_channels: Sequence[int] = (32, 64, 128, 256),
        out_channels: int = 2048,
        norm_cfg: dict = dict(type='BN'),
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_neck(in_channels, mid_channels, out_channels)
        self.in_channels = tuple(in_channels)
        widths = [channels * Bottleneck.expansion for channels in mid_channels]
        check_norm_cfg(norm_cfg, (*in_channels, *mid_channels, *widths, out_channels))
        self.incre_modules = nn.ModuleList(
            nn.Sequential(Bottleneck(cin, mid, depthwise=True, norm_cfg=norm_cfg))
            for cin, mid in zip(in_channels, mid_channels)
        )
        self.downsamp_modules = nn.ModuleList(
            nn.Sequential(
                DepthwiseConv2d(cin, stride=2),
                build_norm_layer(norm_cfg, cin)[1],
                nn.Conv2d(cin, cout, 1),
                build_norm_layer(norm_cfg, cout)[1],
                nn.ReLU(inplace=True),
            )
            for cin, cout in pairwise(widths)
        )
        self.final_layer = nn.Sequential(
            nn.Conv2d(widths[-1], out_channels, 1),
            build_norm_layer(norm_cfg, out_channels)[1],
            nn.ReLU(inplace=True),
        )

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor]:
        """Sum the streams, from the finest to the coarsest.

        Args:
            xs (Sequence[Tensor]): Streams of shape (B, C_i, H / 2**i, W / 2**i).

        Returns:
            tuple[Tensor]: One map of shape (B, out_channels, H / 8, W / 8).

        Raises:
            ValueError: If the number of streams or their channels do not match the neck.
        """
        if len(xs) != len(self.incre_modules):
            raise ValueError(
                f'HRFormerFusion got {len(xs)} streams, but expects {len(self.incre_modules)}: set '
                "the backbone's out_indices to all of them"
            )
        channels = tuple(x.shape[1] for x in xs)
        if channels != self.in_channels:
            raise ValueError(
                f'HRFormerFusion got streams of {channels} channels, but in_channels is '
                f"{self.in_channels}: set in_channels to the channels of the backbone's arch"
            )
        total = self.incre_modules[0](xs[0])
        for x, widen, halve in zip(xs[1:], self.incre_modules[1:], self.downsamp_modules):
            total = widen(x) + halve(total)
        return (self.final_layer(total),)

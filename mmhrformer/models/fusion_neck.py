"""The classification neck of HRFormer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..registry import MODELS
from .block import Bottleneck
from .checks import check_norm_cfg
from .ffn import DepthwiseConv2d


@MODELS.register_module()
class HRFormerFusion(BaseModule):
    """Fuse four streams into one map for classification.

    Each stream is widened by a bottleneck with a depth-wise 3x3 convolution. From the finest
    stream on, the sum is halved in size, doubled in channels and added to the next stream; a
    1x1 convolution widens the last sum. This is HRNet's classification head with depth-wise
    convolutions, as in the official code.

    Args:
        in_channels (Sequence[int]): Channels of the four streams, finest first.
        mid_channels (Sequence[int]): Channels of the bottlenecks; each stream leaves its
            bottleneck with four times as many. Defaults to (32, 64, 128, 256).
        out_channels (int): Channels of the fused map. Defaults to 2048.
        norm_cfg (dict): Config of the normalization. Defaults to ``dict(type='BN')``.
        init_cfg (dict, optional): Initialization config of mmengine.

    Raises:
        ValueError: If ``in_channels`` and ``mid_channels`` differ in length, or a number of
            channels or the normalization is not possible.

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
        self._check_channels(in_channels, mid_channels, out_channels)
        self.in_channels = tuple(in_channels)
        if len(in_channels) != len(mid_channels):
            raise ValueError(
                f'in_channels={tuple(in_channels)} and mid_channels={tuple(mid_channels)} must '
                'name the same streams: give them equal lengths'
            )
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

    @staticmethod
    def _check_channels(
        in_channels: Sequence[int], mid_channels: Sequence[int], out_channels: int
    ) -> None:
        """Check each argument for itself."""
        lists = dict(in_channels=in_channels, mid_channels=mid_channels)
        for name, value in (*lists.items(), ('out_channels', [out_channels])):
            good = isinstance(value, Sequence) and len(value)
            if not good or not all(isinstance(n, Integral) and n > 0 for n in value):
                wanted = 'one for each stream' if name in lists else 'such as 2048'
                given = value if name in lists else out_channels
                raise ValueError(f'{name}={given!r}: give whole numbers of at least 1, {wanted}')

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor]:
        """Fuse the streams.

        Args:
            xs (Sequence[Tensor]): Streams of shape (B, C_i, H / 2**i, W / 2**i).

        Returns:
            tuple[Tensor]: One map of shape (B, out_channels, H / 8, W / 8).

        Raises:
            ValueError: If there are not as many streams as the neck was made for, or not with its
                channels.
        """
        if len(xs) != len(self.incre_modules):
            raise ValueError(
                f'HRFormerFusion got {len(xs)} streams, it fuses {len(self.incre_modules)}: set '
                "the backbone's out_indices to all of them"
            )
        channels = tuple(x.shape[1] for x in xs)
        if channels != self.in_channels:
            raise ValueError(
                f'HRFormerFusion got streams of {channels} channels, in_channels is '
                f"{self.in_channels}: set in_channels to the channels of the backbone's arch"
            )
        fused = self.incre_modules[0](xs[0])
        for x, widen, halve in zip(xs[1:], self.incre_modules[1:], self.downsamp_modules):
            fused = widen(x) + halve(fused)
        return (self.final_layer(fused),)

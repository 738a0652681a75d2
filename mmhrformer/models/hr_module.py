"""The module that HRFormer's stages repeat: blocks on each stream, then an exchange."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule, ModuleList, Sequential
from torch import Tensor, nn

from .. import ops
from ..ops.state import may_differ
from .ffn import DepthwiseConv2d


class HRModule(BaseModule):
    """Blocks on each stream, then an exchange between all streams (paper, Figure 2).

    Args:
        branches (Sequence[nn.Module]): The blocks of each stream, finest stream first.
        channels (Sequence[int]): Channels of the streams.
        out_streams (Sequence[int]): Streams that the exchange outputs; others are not computed.
        upsample (str): ``'nearest'`` or ``'bilinear'``, see :class:`HRFormer`.
        norm_cfg (dict): Config of the normalization.
    """

    def __init__(
        self,
        branches: Sequence[nn.Module],
        channels: Sequence[int],
        out_streams: Sequence[int],
        upsample: str,
        norm_cfg: dict,
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.out_streams = tuple(out_streams)
        self.branches = ModuleList(branches)
        # The position i is part of the checkpoint keys, so an unused stream keeps a placeholder
        # (an Identity: mmengine's complexity analysis cannot handle None).
        self.fuse_layers = ModuleList(
            ModuleList(self._exchange_layer(channels, i, j, norm_cfg) for j in range(len(channels)))
            if i in out_streams
            else nn.Identity()
            for i in range(max(out_streams) + 1)
        )
        self.relu = nn.ReLU(inplace=True)

    @staticmethod
    def _exchange_layer(channels: Sequence[int], i: int, j: int, norm_cfg: dict) -> nn.Module:
        """Layer from stream j to the channels of stream i, and to its size if j is finer."""
        if j == i:
            return nn.Identity()
        if j > i:
            return Sequential(
                nn.Conv2d(channels[j], channels[i], 1, bias=False),
                build_norm_layer(norm_cfg, channels[i])[1],
            )
        steps = []
        for step in range(j, i):
            is_last = step == i - 1
            out_channels = channels[i] if is_last else channels[j]
            layers = [
                DepthwiseConv2d(channels[j], stride=2, bias=False),
                build_norm_layer(norm_cfg, channels[j])[1],
                nn.Conv2d(channels[j], out_channels, 1, bias=False),
                build_norm_layer(norm_cfg, out_channels)[1],
            ]
            steps.append(Sequential(*layers, *([] if is_last else [nn.ReLU(inplace=True)])))
        return Sequential(*steps)

    def enlarge(self, x: Tensor, factor: int, size: torch.Size) -> Tensor:
        """Enlarge a map (B, C, H, W) by a factor, and correct it to the size (H', W')."""
        x = ops.enlarge(x, factor, self.upsample)
        if may_differ(x.shape[-2:], size):
            # Odd sizes were rounded up when they were halved. The official codes correct this by
            # bilinear resizing: classification and segmentation (nearest) with aligned corners,
            # pose (bilinear) without.
            aligned = self.upsample == 'nearest'
            x = F.interpolate(x, size=size, mode='bilinear', align_corners=aligned)
        return x

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor | None]:
        """Transform and exchange streams.

        Args:
            xs (Sequence[Tensor]): Streams of shape (B, C_i, H_i, W_i), finest first.

        Returns:
            list[Tensor | None]: Streams of the same shapes, None where not in ``out_streams``.
        """
        # The blocks work on channels-last maps: change the layout here, once per module.
        xs = [
            branch(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
            for branch, x in zip(self.branches, xs)
        ]
        return [self._exchange(xs, i) if i in self.out_streams else None for i in range(len(xs))]

    def _exchange(self, xs: Sequence[Tensor], i: int) -> Tensor:
        """Sum all streams at the size and channels of stream i."""
        first = self.fuse_layers[i][0](xs[0])
        return ops.exchange_sum(first, self._others(xs, i), self.upsample, self.relu)

    def _others(self, xs: Sequence[Tensor], i: int) -> Iterator[tuple[Tensor, int]]:
        """Contributions to stream i of all but the first, each with the factor to enlarge it by."""
        for j, x in enumerate(xs[1:], 1):
            x, factor = self.fuse_layers[i][j](x), 2 ** max(0, j - i)
            size = xs[i].shape[-2:]
            if j > i and may_differ(x.shape[-2:], size, factor):
                x, factor = self.enlarge(x, factor, size), 1
            yield x, factor

"""Convolutions with as many channels as the layouts of runtimes need."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.ffn import DWConvFFN
from .fuse import SharedConv, append_zeros, is_plain_conv

MULTIPLE = 4  # of channels in, for onnxruntime to choose its blocked layout


class AlignedConv(SharedConv):
    """A 1x1 convolution that pads its input with zero channels to a multiple of 4.

    Of shipped models only HRFormer-B has such a map: 78 channels become 80. With windows gathered
    by constant indices as well, its blocks are 1.06 to 1.09 times as fast in onnxruntime 1.31,
    1.04 to 1.05 times without this (a prototype of the same operations, on a busy machine).

    Args:
        conv (nn.Conv2d): The convolution, which :meth:`fits`. It is left as it is.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.missing = -conv.in_channels % MULTIPLE
        append_zeros(self, self.missing, 0)

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        """Whether a convolution can be replaced, and needs to be."""
        return (
            is_plain_conv(conv)
            and conv.kernel_size == (1, 1)
            and conv.groups == 1
            and conv.in_channels % MULTIPLE > 0
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, in_channels, H, W), channels-last in memory, to (B, out_channels, H, W)."""
        x = F.pad(x.permute(0, 2, 3, 1), (0, self.missing))  # (B, H, W, multiple of 4)
        return super().forward(x.permute(0, 3, 1, 2))


def align_channels(model: nn.Module) -> nn.Module:
    """Replace the first convolution of each FFN by an :class:`AlignedConv` if it fits, in place."""
    for module in model.modules():
        if isinstance(module, DWConvFFN) and AlignedConv.fits(module.fc1):
            module.fc1 = AlignedConv(module.fc1)
    return model

"""Convolutions with as many channels as the layouts of runtimes need."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.ffn import DWConvFFN
from .fuse import SharedConv, append_zeros, is_plain_conv

MULTIPLE = 4  # of channels in, for onnxruntime to choose its blocked layout
MIN_CHANNELS = 16  # fewer, such as those of an image, are not worth a copy


class AlignedConv(SharedConv):
    """A convolution that pads its input with zero channels to a multiple of 4.

    Of shipped models HRFormer-T and -B have such maps: 18 and 78 channels in FFNs and pose heads
    become 20 and 80, and the 270 and 1,170 of all streams in OCR heads become 272 and 1,172. In
    onnxruntime 1.31 on one core, the blocks of HRFormer-B are 1.02 to 1.03 times as fast with it
    (1.06 to 1.09 instead of 1.04 to 1.05 times, windows gathered by indices included), B with its
    pose head 1.02 times, and with its OCR head at 512x1024 1.10 times.

    Args:
        conv (nn.Conv2d): The convolution, which :meth:`fits`. It is left as it is.
        channels_last (bool): Whether the input is a permuted map (B, H, W, C), as in FFNs. Defaults
            to False.
    """

    def __init__(self, conv: nn.Conv2d, channels_last: bool = False) -> None:
        super().__init__(conv)
        self.missing, self.channels_last = -conv.in_channels % MULTIPLE, channels_last
        append_zeros(self, self.missing, 0)

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        """Whether a convolution can be replaced, and needs to be."""
        return (
            is_plain_conv(conv)
            and conv.groups == 1
            and conv.in_channels >= MIN_CHANNELS
            and conv.in_channels % MULTIPLE > 0
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, in_channels, H, W) to (B, out_channels, H', W')."""
        if self.channels_last:
            x = pad_channels(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = F.pad(x, (0, 0, 0, 0, 0, self.missing))
        return super().forward(x)


def pad_channels(x: Tensor) -> Tensor:
    """Append zero channels to a map (B, H, W, C), up to a multiple of 4."""
    missing = -x.shape[-1] % MULTIPLE
    return F.pad(x, (0, missing)) if missing else x


def align_channels(model: nn.Module) -> nn.Module:
    """Replace convolutions of many channels by :class:`AlignedConv` where they fit, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if AlignedConv.fits(child):
                setattr(module, name, AlignedConv(child, isinstance(module, DWConvFFN)))
    return model

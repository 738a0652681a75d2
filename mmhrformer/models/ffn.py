"""The feed-forward network of the HRFormer block."""

from __future__ import annotations

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from .. import ops
from ..ops.kernels import have_shapes
from ..ops.recompute import is_plain
from ..registry import MODELS
from .checks import check_norm_cfg


class DepthwiseConv2d(nn.Conv2d):
    """3x3 depth-wise convolution, padded with zeros.

    Args:
        channels (int): Input and output channels.
        stride (int): Stride. Defaults to 1.
        bias (bool): Whether to learn a bias. Defaults to True.
    """

    def __init__(self, channels: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(channels, channels, 3, stride, padding=1, groups=channels, bias=bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        stride = self.stride[0]
        geometry = self.stride, self.padding, self.dilation, self.padding_mode
        if geometry != ((stride, stride), (1, 1), (1, 1), 'zeros'):
            return super()._conv_forward(x, weight, bias)  # changed, such as to dilate it
        return ops.depthwise_conv(x, weight, bias, stride)


@MODELS.register_module()
class DWConvFFN(BaseModule):
    """FFN with a 3x3 depth-wise convolution, which connects the windows (paper, Figure 1b).

    1x1 - 3x3 depth-wise - 1x1 convolution, each followed by batch normalization and GELU. The last
    GELU comes before the residual sum, as in the official code.

    Args:
        embed_dims (int): Input and output channels C.
        feedforward_channels (int): Hidden channels; 4 C in the paper (Section 3).
        norm_cfg (dict): Config of the normalization. Defaults to ``dict(type='BN')``.
        init_cfg (dict, optional): Initialization config of mmengine.

    Raises:
        ValueError: If the normalization does not work with these numbers of channels.

    Examples:
        >>> import torch
        >>> ffn = DWConvFFN(embed_dims=32, feedforward_channels=128)
        >>> ffn(torch.rand(2, 16, 12, 32)).shape
        torch.Size([2, 16, 12, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        norm_cfg: dict = dict(type='BN'),
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_norm_cfg(norm_cfg, (embed_dims, feedforward_channels))
        self.feedforward_channels = feedforward_channels
        self.fc1 = nn.Conv2d(embed_dims, feedforward_channels, 1)
        self.norm1 = build_norm_layer(norm_cfg, feedforward_channels)[1]
        self.dw3x3 = DepthwiseConv2d(feedforward_channels)
        self.norm2 = build_norm_layer(norm_cfg, feedforward_channels)[1]
        self.fc2 = nn.Conv2d(feedforward_channels, embed_dims, 1)
        self.norm3 = build_norm_layer(norm_cfg, embed_dims)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map of shape (B, H, W, C) to one of the same shape."""
        if ops.has_conv_ffn(x, self):
            return ops.conv_ffn(x, self)
        x = x.permute(0, 3, 1, 2)  # (B, C, H, W), channels-last in memory: nothing is copied
        x = ops.norm_gelu_conv(self.fc1(x), self.norm1, self.dw3x3)
        x = ops.norm_gelu_conv(x, self.norm2, self.fc2)
        x = ops.norm_gelu_conv(x, self.norm3)
        return x.permute(0, 2, 3, 1)

    def is_intact(self) -> bool:
        """Whether the convolutions are as they were made, not replaced, hooked or the like."""
        kinds, convs = (nn.Conv2d, DepthwiseConv2d, nn.Conv2d), (self.fc1, self.dw3x3, self.fc2)
        are_plain = all(
            type(conv) is kind and is_plain(conv, kind) and conv.bias is not None
            for conv, kind in zip(convs, kinds)
        )
        return are_plain and have_shapes(*convs)

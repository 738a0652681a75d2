"""The FFN without the depth-wise convolution (paper, Table 7)."""

from __future__ import annotations

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from ... import ops
from ...registry import MODELS
from ..checks import check_norm_cfg


@MODELS.register_module()
class FFN(BaseModule):
    """The FFN without the 3x3 depth-wise convolution (paper, Table 7).

    It is :class:`DWConvFFN` without the convolution and the normalization and GELU after it, so it
    does not connect the windows. Without ``with_norm`` it is the FFN of ViT and Swin Transformer,
    linear - GELU - linear.

    Args:
        embed_dims (int): Input and output channels C.
        feedforward_channels (int): Hidden channels; 4 C in the paper (Section 3).
        norm_cfg (dict): Config of the normalization. Defaults to ``dict(type='BN')``.
        with_norm (bool): Whether a normalization and a GELU follow each of the two layers, as in
            :class:`DWConvFFN`. Defaults to True.
        init_cfg (dict, optional): Initialization config of mmengine.

    Raises:
        ValueError: If the normalization does not work with these numbers of channels.

    Examples:
        >>> import torch
        >>> ffn = FFN(embed_dims=32, feedforward_channels=128)
        >>> ffn(torch.rand(2, 16, 12, 32)).shape
        torch.Size([2, 16, 12, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        norm_cfg: dict = dict(type='BN'),
        with_norm: bool = True,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if with_norm:
            check_norm_cfg(norm_cfg, (embed_dims, feedforward_channels))
        self.with_norm = with_norm
        self.fc1 = nn.Conv2d(embed_dims, feedforward_channels, 1)
        self.norm1 = nn.Identity()
        if with_norm:
            self.norm1 = build_norm_layer(norm_cfg, feedforward_channels)[1]
        self.fc2 = nn.Conv2d(feedforward_channels, embed_dims, 1)
        # Named as in DWConvFFN and its checkpoints, where norm2 follows the convolution.
        self.norm3 = nn.Identity()
        if with_norm:
            self.norm3 = build_norm_layer(norm_cfg, embed_dims)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map of shape (B, H, W, C) to one of the same shape."""
        x = x.permute(0, 3, 1, 2)  # (B, C, H, W), channels-last in memory: nothing is copied
        x = ops.norm_gelu_conv(self.fc1(x), self.norm1, self.fc2)
        x = ops.norm_gelu_conv(x, self.norm3) if self.with_norm else x
        return x.permute(0, 2, 3, 1)

"""The blocks of HRFormer: the bottleneck of stage 1 and the transformer block of the others."""

from __future__ import annotations

from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn

from .. import ops
from ..ops.recompute import recompute
from ..registry import MODELS
from .checks import check_probability, complete_cfg, hidden_channels
from .ffn import DepthwiseConv2d


class Bottleneck(BaseModule):
    """Residual bottleneck, 1x1 - 3x3 - 1x1 convolution (ResNet).

    Args:
        in_channels (int): Input channels.
        mid_channels (int): Channels of the 3x3 convolution.
        depthwise (bool): Whether the 3x3 convolution is depth-wise, as in the classification
            neck. Defaults to False.
        norm_cfg (dict): Config of the normalization. Defaults to ``dict(type='BN')``.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        depthwise: bool = False,
        norm_cfg: dict = dict(type='BN'),
    ) -> None:
        super().__init__()
        out_channels = mid_channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        self.bn1 = build_norm_layer(norm_cfg, mid_channels)[1]
        if depthwise:
            self.conv2 = DepthwiseConv2d(mid_channels, bias=False)
        else:
            self.conv2 = nn.Conv2d(mid_channels, mid_channels, 3, padding=1, bias=False)
        self.bn2 = build_norm_layer(norm_cfg, mid_channels)[1]
        self.conv3 = nn.Conv2d(mid_channels, out_channels, 1, bias=False)
        self.bn3 = build_norm_layer(norm_cfg, out_channels)[1]
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Identity()
        if in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                build_norm_layer(norm_cfg, out_channels)[1],
            )

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, in_channels, H, W) to (B, 4 * mid_channels, H, W)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.downsample(x))


@MODELS.register_module()
class HRFormerBlock(BaseModule):
    """Transformer block: attention within windows, then the FFN (paper, Figure 1).

    Args:
        embed_dims (int): Channels C of the map.
        num_heads (int): Attention heads; must divide ``embed_dims``.
        window_size (int): Side of the attention windows, in tokens. Defaults to 7.
        mlp_ratio (float): Hidden channels of the FFN in multiples of C. Defaults to 4.
        drop_path_rate (float): Stochastic depth rate, the probability of skipping a residual path
            of a sample in training. Defaults to 0.
        with_rpe (bool): See :class:`LocalWindowSelfAttention`. Defaults to True.
        pad_mask (bool): See :class:`LocalWindowSelfAttention`. Defaults to False.
        attn_cfg (dict): Config of the attention, without the arguments above.
        ffn_cfg (dict): Config of the FFN, without the arguments above.
        norm_cfg (dict): Config of the normalization in the FFN. Defaults to ``dict(type='BN')``.
        with_cp (bool): Whether to recompute the activations of the block in the backward pass
            instead of keeping them: less memory, more time, same gradients. Defaults to False.
        init_cfg (dict, optional): Initialization config of mmengine.

    Raises:
        ValueError: If an argument is invalid, or also set in ``attn_cfg`` or ``ffn_cfg``.

    Examples:
        >>> import torch
        >>> block = HRFormerBlock(embed_dims=32, num_heads=1)
        >>> block(torch.rand(2, 16, 12, 32)).shape
        torch.Size([2, 16, 12, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 7,
        mlp_ratio: float = 4,
        drop_path_rate: float = 0.0,
        with_rpe: bool = True,
        pad_mask: bool = False,
        attn_cfg: dict = dict(type='mmhrformer.LocalWindowSelfAttention'),
        ffn_cfg: dict = dict(type='mmhrformer.DWConvFFN'),
        norm_cfg: dict = dict(type='BN'),
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_probability('drop_path_rate', drop_path_rate)
        self.with_cp = with_cp
        attn = dict(embed_dims=embed_dims, num_heads=num_heads, window_size=window_size)
        attn.update(with_rpe=with_rpe, pad_mask=pad_mask)
        ffn = dict(embed_dims=embed_dims, norm_cfg=norm_cfg)
        ffn.update(feedforward_channels=hidden_channels(embed_dims, mlp_ratio))
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = MODELS.build(complete_cfg('attn_cfg', attn_cfg, **attn))
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.ffn = MODELS.build(complete_cfg('ffn_cfg', ffn_cfg, **ffn))
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map of shape (B, H, W, C) to one of the same shape."""
        if self.with_cp:
            return recompute(self, self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        y, x = ops.fork_layer_norm(x, self.norm1)
        x = ops.add_path(x, self.attn(y), self.drop_path)
        y, x = ops.fork_layer_norm(x, self.norm2)
        return ops.add_path(x, self.ffn(y), self.drop_path)

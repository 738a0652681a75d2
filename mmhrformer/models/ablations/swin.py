"""mmpretrain's Swin Transformer with an FFN that operates on the map (paper, Table 8)."""

from __future__ import annotations

from mmengine.model import BaseModule
from mmpretrain.models.backbones import SwinTransformer as StockSwinTransformer
from mmpretrain.models.backbones.swin_transformer import SwinBlock as StockSwinBlock
from torch import Tensor

from ...ops.recompute import recompute
from ...registry import MODELS


class SwinBlock(BaseModule):
    """A block of Swin Transformer whose FFN gets a map instead of a sequence.

    Args:
        block (SwinBlock): mmpretrain's block; everything but its FFN is reused.
        ffn_cfg (dict): Config of the FFN, without the numbers of channels.
    """

    def __init__(self, block: StockSwinBlock, ffn_cfg: dict) -> None:
        super().__init__()
        self.with_cp = block.with_cp
        self.norm1, self.attn, self.norm2 = block.norm1, block.attn, block.norm2
        stock = block.ffn
        channels = dict(
            embed_dims=stock.embed_dims, feedforward_channels=stock.feedforward_channels
        )
        self.ffn = MODELS.build({**channels, **ffn_cfg})
        self.drop_path = stock.dropout_layer

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Transform a sequence (B, H * W, C) to one of the same shape."""
        if self.with_cp:
            return recompute(self, self._forward, x, hw_shape)
        return self._forward(x, hw_shape)

    def _forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), hw_shape)  # its drop path is in the attention
        out = self.ffn(self.norm2(x).view(x.shape[0], *hw_shape, x.shape[2]))
        return x + self.drop_path(out.flatten(1, 2))


@MODELS.register_module()
class SwinTransformer(StockSwinTransformer):
    """mmpretrain's Swin Transformer with another FFN.

    The stock blocks always build mmcv's FFN, which processes each token alone. To disable shifted
    windows, the stock option is enough: ``stage_cfgs=dict(block_cfgs=dict(shift=False))``.

    Args:
        *args: Arguments of mmpretrain's ``SwinTransformer``.
        ffn_cfg (dict): The registered FFN of the blocks, with its own options. Defaults to
            ``dict(type='mmhrformer.DWConvFFN')``.
        **kwargs: Arguments of mmpretrain's ``SwinTransformer``.
    """

    def __init__(self, *args, ffn_cfg: dict = dict(type='mmhrformer.DWConvFFN'), **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for stage in self.stages:
            for i, block in enumerate(stage.blocks):
                stage.blocks[i] = SwinBlock(block, ffn_cfg)

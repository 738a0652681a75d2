"""Self-attention inside local windows (HRFormer, Section 3, "local-window self-attention")."""

from __future__ import annotations

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from .. import ops
from ..ops.windows import is_static, padding_mask, window_merge, window_partition
from ..registry import MODELS
from .checks import check_attention


def split_heads(qkv: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """Split (B * nW, N, 3 * heads * head_dim) into (B * nW, N, 3, heads, head_dim)."""
    # Not unflatten: torch's ONNX exporter would make the number of windows constant.
    return qkv.reshape(*qkv.shape[:2], 3, num_heads, head_dim)


@MODELS.register_module()
class LocalWindowSelfAttention(BaseModule):
    """Multi-head self-attention in non-overlapping square windows.

    The map is padded with zeros to a multiple of the window, on all sides, before the projection to
    query, key and value. As in the official code, the padded tokens take part in the softmax unless
    ``pad_mask`` is set.

    Args:
        embed_dims (int): Channels C of the map.
        num_heads (int): Attention heads; must divide ``embed_dims``.
        window_size (int): Side of the windows, in tokens. Defaults to 7 (paper, Section 3).
        with_rpe (bool): Whether to add a learned relative position bias to the attention
            logits. Defaults to True.
        pad_mask (bool): Whether to exclude padded tokens from the softmax. The official
            checkpoints were trained without it. Defaults to False.
        init_cfg (dict, optional): Initialization config of mmengine.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dims`` or ``window_size`` < 1.

    Examples:
        >>> attn = LocalWindowSelfAttention(embed_dims=32, num_heads=2, window_size=7)
        >>> attn(torch.rand(2, 16, 12, 32)).shape
        torch.Size([2, 16, 12, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 7,
        with_rpe: bool = True,
        pad_mask: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_attention(embed_dims, num_heads, window_size)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.window_size = window_size
        self.pad_mask = pad_mask
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        if with_rpe:
            offsets = (2 * window_size - 1) ** 2
            self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads))
        else:
            self.relative_position_bias_table = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the relative position biases as Swin Transformer does."""
        if self.relative_position_bias_table is not None:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows: transform a map of shape (B, H, W, C) to one of the same shape."""
        size, window, heads = x.shape[1:3], self.window_size, self.num_heads
        if ops.attends_on_map(x, self.qkv, heads, window) and self._has_stock_bias():
            # One kernel reads the windows directly from the map, without copies.
            table = self.relative_position_bias_table
            return ops.attend_on_map(x, self.qkv, self.proj, table, heads, window, self.pad_mask)
        head_dim = self.embed_dims // heads
        windows = window_partition(x, window)  # (B * nW, N, C)
        qkv = split_heads(self.qkv(windows), heads, head_dim)  # (B * nW, N, 3, heads, head_dim)
        windows = ops.window_attention(qkv, self.attention_bias(size, qkv), head_dim**-0.5)
        return window_merge(self.proj(windows), window, size)

    def _has_stock_bias(self) -> bool:
        """Whether the bias is not overridden: kernels support only the one defined here."""
        stock = LocalWindowSelfAttention
        return all(
            getattr(getattr(self, name), '__func__', None) is getattr(stock, name)
            for name in ('attention_bias', 'relative_position_bias')
        )

    def attention_bias(self, size: tuple[int, int], qkv: Tensor) -> Tensor | None:
        """Bias of the attention logits: relative positions, and the mask of padding.

        Args:
            size (tuple[int, int]): Height H and width W of the map without padding.
            qkv (Tensor): Queries, keys and values of shape (B * nW, N, 3, heads, head_dim).

        Returns:
            Tensor | None: Bias that broadcasts to (B * nW, heads, N, N), in the data type of
            ``qkv``; None for no bias.
        """
        bias = None
        if self.relative_position_bias_table is not None:
            bias = self.relative_position_bias(qkv.dtype)
        divided = is_static(*size) and not any(side % self.window_size for side in size)
        if self.pad_mask and not divided:
            padded = padding_mask(size, self.window_size, qkv.device)  # (nW, N)
            mask = torch.zeros_like(padded, dtype=qkv.dtype).masked_fill_(padded, float('-inf'))
            mask = mask.repeat(qkv.shape[0] // mask.shape[0], 1)[:, None, None]  # (B * nW, 1, 1, N)
            bias = mask if bias is None else bias + mask
        return bias

    def relative_position_bias(self, dtype: torch.dtype) -> Tensor:
        """Learned bias of every pair of tokens in a window.

        Pair (i, j) takes row ``relative_position_index(window_size)[i, j]`` of the table. Here the
        rows are gathered by views of the table, so that no index buffer is needed.

        Args:
            dtype (torch.dtype): Data type of the result.

        Returns:
            Tensor: Bias of shape (1, heads, N, N).
        """
        window, N = self.window_size, self.window_size**2
        offsets = self.relative_position_bias_table.reshape(2 * window - 1, 2 * window - 1, -1)
        # At (y, x, head, v, u): the table at (y + v, x + u), which is the offset between the query
        # (y, x) and the key (window - 1 - v, window - 1 - u).
        bias = offsets.unfold(0, window, 1).unfold(1, window, 1).flip(3, 4)
        return bias.permute(2, 0, 1, 3, 4).reshape(1, -1, N, N).to(dtype)

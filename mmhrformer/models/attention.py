"""Self-attention inside local windows (HRFormer, Section 3, "local-window self-attention")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..registry import MODELS


def window_padding(size: int, window: int) -> tuple[int, int]:
    """Zeros to add before and after an axis so that windows divide it; the odd one goes last."""
    missing = -size % window
    return missing // 2, missing - missing // 2


def window_partition(x: Tensor, window: int, padding: Tensor | None = None) -> Tensor:
    """Cut a map into windows, after padding it on all sides alike.

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        window (int): Side of the square windows, in tokens.
        padding (Tensor, optional): What to pad with, of shape (C,). Defaults to None: zeros.

    Returns:
        Tensor: Windows in row-major order, tokens in row-major order within each, of shape
        (B * rows * cols, window * window, C), where rows = ceil(H / window).
    """
    B, H, W, C = x.shape
    top, bottom = window_padding(H, window)
    left, right = window_padding(W, window)
    if top or bottom or left or right:
        if padding is None:
            x = F.pad(x, (0, 0, left, right, top, bottom))
        else:
            inside = x
            x = padding.expand(B, top + H + bottom, left + W + right, C).clone()
            x[:, top : top + H, left : left + W] = inside
    rows, cols = x.shape[1] // window, x.shape[2] // window
    x = x.view(B, rows, window, cols, window, C).transpose(2, 3)  # (B, rows, cols, w, w, C)
    return x.reshape(B * rows * cols, window * window, C)


def window_merge(windows: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """Put windows together again and cut the padding off: undoes :func:`window_partition`.

    Args:
        windows (Tensor): Windows of shape (B * rows * cols, window * window, C).
        window (int): Side of the square windows, in tokens.
        size (tuple[int, int]): Height H and width W of the map without padding.

    Returns:
        Tensor: Map of shape (B, H, W, C).
    """
    H, W = size
    rows, cols = -(-H // window), -(-W // window)
    x = windows.view(-1, rows, cols, window, window, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(-1, rows * window, cols * window, windows.shape[-1])
    top, _ = window_padding(H, window)
    left, _ = window_padding(W, window)
    return x[:, top : top + H, left : left + W]


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for every (query, key) pair of a window, as in Swin Transformer.

    Args:
        window (int): Side of the square windows, in tokens.

    Returns:
        Tensor: int64 indices of shape (window**2, window**2) into (2 * window - 1)**2 offsets.
    """
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing='ij')
    y, x = y.flatten(), x.flatten()
    dy = y[:, None] - y[None, :] + window - 1
    dx = x[:, None] - x[None, :] + window - 1
    return dy * (2 * window - 1) + dx


def padding_mask(size: tuple[int, int], window: int, device: torch.device) -> Tensor:
    """Which tokens of which window are padding.

    Args:
        size (tuple[int, int]): Height H and width W of the map without padding.
        window (int): Side of the square windows, in tokens.
        device (torch.device): Where to make the mask.

    Returns:
        Tensor: Booleans of shape (rows * cols, window * window), True where padded.
    """
    real = torch.ones(1, *size, 1, device=device)
    return window_partition(real, window).squeeze(-1) == 0


@MODELS.register_module()
class LocalWindowSelfAttention(BaseModule):
    """Multi-head self-attention in non-overlapping square windows.

    The map is padded with zeros to a multiple of the window, centred, before the projection to
    query, key and value. As in the official code the padded tokens take part in the softmax
    unless ``pad_mask`` is set.

    Args:
        embed_dims (int): Channels C of the map.
        num_heads (int): Attention heads; must divide ``embed_dims``.
        window_size (int): Side of the windows, in tokens. Defaults to 7 (paper, Section 3).
        with_rpe (bool): Whether to add a learned relative position bias to the attention
            logits. Defaults to True.
        pad_mask (bool): Whether to keep padded tokens out of the softmax. Official checkpoints
            were trained without. Defaults to False.
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
        if num_heads < 1 or embed_dims % num_heads:
            raise ValueError(
                f'num_heads={num_heads} does not divide embed_dims={embed_dims}: '
                'choose a number of heads that divides the channels of its stream'
            )
        if window_size < 1:
            raise ValueError(f'window_size={window_size}: a window has at least 1 token a side')
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.window_size = window_size
        self.pad_mask = pad_mask
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        if with_rpe:
            offsets = (2 * window_size - 1) ** 2
            self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
            index = relative_position_index(window_size)
            self.register_buffer('relative_position_index', index, persistent=False)
        else:
            self.relative_position_bias_table = None

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows.

        Args:
            x (Tensor): Map of shape (B, H, W, C).

        Returns:
            Tensor: Map of the same shape.
        """
        size = x.shape[1:3]
        windows = window_partition(x, self.window_size)  # (B * nW, N, C)
        qkv = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B * nW, heads, N, head_dim) each
        bias = self.attention_bias(size, q)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        windows = self.proj(out.transpose(1, 2).flatten(2))  # (B * nW, N, C)
        return window_merge(windows, self.window_size, size)

    def attention_bias(self, size: tuple[int, int], q: Tensor) -> Tensor | None:
        """What is added to the attention logits.

        Args:
            size (tuple[int, int]): Height H and width W of the map without padding.
            q (Tensor): Queries of shape (B * nW, heads, N, head_dim).

        Returns:
            Tensor | None: Bias that broadcasts to (B * nW, heads, N, N), of q's dtype, or None
            if there is nothing to add.
        """
        bias = None
        if self.relative_position_bias_table is not None:
            bias = self.relative_position_bias_table[self.relative_position_index]  # (N, N, heads)
            bias = bias.permute(2, 0, 1)[None].to(q.dtype)
        if self.pad_mask and (size[0] % self.window_size or size[1] % self.window_size):
            padded = padding_mask(size, self.window_size, q.device)  # (nW, N)
            mask = torch.zeros_like(padded, dtype=q.dtype).masked_fill_(padded, float('-inf'))
            mask = mask.repeat(q.shape[0] // len(mask), 1)[:, None, None]  # (B * nW, 1, 1, N)
            bias = mask if bias is None else bias + mask
        return bias

"""Self-attention in shifted windows, as in Swin Transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...ops import window_count, window_merge, window_padding, window_partition
from ...registry import MODELS
from ..attention import LocalWindowSelfAttention, split_heads


def shifted_axis(size: int, window: int, shift: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Origin of the positions of an axis that was padded to whole windows and then shifted.

    Returns:
        tuple[Tensor, Tensor]: Booleans for each position, (padded size,): whether it was wrapped
        around from the start to the end, and whether it is padding.
    """
    padded = window_count(size, window) * window
    before, _ = window_padding(size, window)
    places = torch.arange(padded, device=device) + shift
    moved_around = places >= padded
    places = places % padded
    return moved_around, (places < before) | (places >= before + size)


def shifted_window_mask(
    size: tuple[int, int],
    window: int,
    shift: int,
    pad_mask: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Mask between tokens that the shift moved into one window from opposite edges.

    Args:
        size (tuple[int, int]): Height H and width W of the map without padding.
        window (int): Side of the windows, in tokens.
        shift (int): Tokens by which the padded map was shifted up and to the left.
        pad_mask (bool): Whether padded tokens are hidden from the others as well.
        dtype (torch.dtype): Data type of the result.
        device (torch.device): Device of the result.

    Returns:
        Tensor: 0 where a query (third axis) may see a key (last axis), else minus infinity, of
        shape (nW, 1, N, N).
    """
    rows, padded_rows = shifted_axis(size[0], window, shift, device)
    cols, padded_cols = shifted_axis(size[1], window, shift, device)
    origin = 2 * rows[:, None] + cols.long()  # the corner of the map that a token comes from
    padded = (padded_rows[:, None] | padded_cols).long()
    maps = torch.stack([origin, padded], -1)[None]  # (1, H', W', 2)
    origin, padded = window_partition(maps, window).unbind(-1)  # (nW, N) each
    hidden = origin[:, :, None] != origin[:, None]
    if pad_mask:
        # Padding still sees padding, as there may be nothing else; its output is cropped anyway.
        hidden = hidden | (padded[:, None] > padded[:, :, None])
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return mask.masked_fill(hidden, float('-inf'))[:, None]


@MODELS.register_module()
class ShiftedWindowSelfAttention(LocalWindowSelfAttention):
    """Multi-head self-attention in shifted square windows (Swin Transformer).

    The map is padded as in :class:`LocalWindowSelfAttention`. The padded map is rolled up and to
    the left, partitioned into windows, and rolled back after the attention. Tokens that share a
    window only because they were wrapped around an edge do not see each other. A map with a side
    that is not larger than a window is not shifted, as in Swin Transformer.

    For alternating windows pass both kinds to the backbone: ``attn_cfg=[dict(type=
    'mmhrformer.LocalWindowSelfAttention'), dict(type='mmhrformer.ShiftedWindowSelfAttention')]``.

    Args:
        embed_dims (int): Channels C of the map.
        num_heads (int): Attention heads; must divide ``embed_dims``.
        window_size (int): Side of the windows, in tokens. Defaults to 7.
        shift_size (int, optional): Tokens to shift by, less than ``window_size``. Defaults to
            None: half a window, rounded down.
        with_rpe (bool): See :class:`LocalWindowSelfAttention`. Defaults to True.
        pad_mask (bool): See :class:`LocalWindowSelfAttention`. Defaults to False.
        init_cfg (dict, optional): Initialization config of mmengine.

    Raises:
        ValueError: If an argument is invalid.

    Examples:
        >>> attn = ShiftedWindowSelfAttention(embed_dims=32, num_heads=2, window_size=7)
        >>> attn(torch.rand(2, 16, 12, 32)).shape
        torch.Size([2, 16, 12, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 7,
        shift_size: int | None = None,
        with_rpe: bool = True,
        pad_mask: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(embed_dims, num_heads, window_size, with_rpe, pad_mask, init_cfg)
        self.shift_size = window_size // 2 if shift_size is None else shift_size
        if not 0 <= self.shift_size < window_size:
            raise ValueError(
                f'shift_size={shift_size}: expected a number from 0 to window_size - 1 = '
                f'{window_size - 1}, or None for half a window'
            )

    def shift_for(self, size: tuple[int, int]) -> int:
        """Tokens by which a map of the given size is shifted."""
        return self.shift_size if min(size) > self.window_size else 0

    def forward(self, x: Tensor) -> Tensor:
        """Attend within shifted windows: transform a map (B, H, W, C) to one of the same shape."""
        H, W = x.shape[1:3]
        shift = self.shift_for((H, W))
        if not shift:
            return super().forward(x)
        top, bottom = window_padding(H, self.window_size)
        left, right = window_padding(W, self.window_size)
        x = F.pad(x, (0, 0, left, right, top, bottom)).roll((-shift, -shift), (1, 2))
        head_dim = self.embed_dims // self.num_heads
        windows = window_partition(x, self.window_size)  # (B * nW, N, C)
        qkv = split_heads(self.qkv(windows), self.num_heads, head_dim)
        windows = ops.window_attention(qkv, self.attention_bias((H, W), qkv), head_dim**-0.5)
        x = window_merge(self.proj(windows), self.window_size, x.shape[1:3])
        x = x.roll((shift, shift), (1, 2))
        return x[:, top : top + H, left : left + W]

    def attention_bias(self, size: tuple[int, int], qkv: Tensor) -> Tensor | None:
        """Bias of the attention logits, see :class:`LocalWindowSelfAttention`."""
        shift = self.shift_for(size)
        if not shift:
            return super().attention_bias(size, qkv)
        bias = shifted_window_mask(
            size, self.window_size, shift, self.pad_mask, qkv.dtype, qkv.device
        )
        if self.relative_position_bias_table is not None:
            bias = bias + self.relative_position_bias(qkv.dtype)  # (nW, heads, N, N)
        return bias.repeat(qkv.shape[0] // bias.shape[0], 1, 1, 1)

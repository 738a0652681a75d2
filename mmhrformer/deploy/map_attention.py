"""Window attention for exported files, which projects the map instead of the windows."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.attention import LocalWindowSelfAttention
from ..ops.recompute import is_plain
from ..ops.windows import window_count, window_padding
from .fuse import make_linear


class MapAttention(nn.Module):
    """:class:`LocalWindowSelfAttention` that projects the map before padding it.

    The projection of padding, which is the bias, then has to be zero: the bias of the keys adds the
    same number to all logits of a query, which the softmax cancels; that of the values moves to the
    output projection, since attention weights sum to 1; queries of padding are cropped. In
    onnxruntime 1.31 on one core at 256x192, HRFormer-S is 1.05 and B 1.07 times as fast; with
    ``fixed_size``, their blocks are 1.05 to 1.07 and 1.04 to 1.05 times as fast once more.

    Args:
        attn (LocalWindowSelfAttention): An attention that :meth:`fits`. It is not changed.
        fixed_size (bool): Whether the graph is used with maps of one size only. Rows of windows and
            heads are then gathered by constant indices, which is faster in runtimes than padding,
            permuting and splitting. Defaults to False.
    """

    def __init__(self, attn: LocalWindowSelfAttention, fixed_size: bool = False) -> None:
        super().__init__()
        self.fixed_size = fixed_size
        self.attn = attn  # computes the bias of the logits
        self.head_dim = attn.embed_dims // attn.num_heads
        weight, bias = attn.qkv.weight.double(), attn.qkv.bias.double()
        queries = weight.new_tensor([self.head_dim**-0.5, 1, 1]).repeat_interleave(attn.embed_dims)
        only_queries = queries * weight.new_tensor([1, 0, 0]).repeat_interleave(attn.embed_dims)
        self.qkv = make_linear(weight * queries[:, None], bias * only_queries, attn.qkv)
        weight, values = attn.proj.weight.double(), bias[-attn.embed_dims :]
        self.proj = make_linear(weight, attn.proj.bias.double() + weight @ values, attn.proj)

    @staticmethod
    def fits(attn: nn.Module) -> bool:
        """Whether an attention can be replaced."""
        return (
            type(attn) is LocalWindowSelfAttention
            and is_plain(attn, LocalWindowSelfAttention)
            and all(is_plain(m, nn.Linear) and m.bias is not None for m in (attn.qkv, attn.proj))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows: transform a map of shape (B, H, W, C) to one of the same shape."""
        return self.proj(self._gather(x) if self.fixed_size else self._permute(x))

    def _gather(self, x: Tensor) -> Tensor:
        """Cut windows and put them together by indices that are constant."""
        (B, H, W, C), window, heads = x.shape, self.attn.window_size, self.attn.num_heads
        size = int(H), int(W)
        places, back = map(torch.from_numpy, window_places(size, window, heads))
        # A token of zeros in front stands for the padding: its keys and values are zero.
        rows = self.qkv(F.pad(x.reshape(B, -1, C), (0, 0, 1, 0))).reshape(B, -1, self.head_dim)
        # (B * nW, heads, N, head_dim) each
        q, k, v = (rows[:, i].reshape(-1, heads, window**2, self.head_dim) for i in places)
        x = self._attend(q, k, v, size).reshape(B, -1, self.head_dim)
        return x[:, back].reshape(B, H, W, C)

    def _permute(self, x: Tensor) -> Tensor:
        """Cut windows and put them together by operations that fit any size."""
        (H, W), window, heads = x.shape[1:3], self.attn.window_size, self.attn.num_heads
        (top, bottom), (left, right) = window_padding(H, window), window_padding(W, window)
        rows, cols = window_count(H, window), window_count(W, window)
        x = F.pad(self.qkv(x), (0, 0, left, right, top, bottom))  # (B, H', W', 3 * C)
        x = x.reshape(-1, rows, window, cols, window, 3, heads, self.head_dim)
        # (3, B * nW, heads, N, head_dim)
        x = x.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, heads, window**2, self.head_dim)
        x = self._attend(*x.unbind(0), (H, W))
        x = x.reshape(-1, rows, cols, heads, window, window, self.head_dim)
        x = x.permute(0, 1, 4, 2, 5, 3, 6)  # (B, rows, window, cols, window, heads, head_dim)
        x = x.reshape(-1, rows * window, cols * window, heads * self.head_dim)
        return x[:, top : top + H, left : left + W]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """Attend within windows of a map of some size, all of (B * nW, heads, N, head_dim)."""
        logits, bias = q @ k.transpose(-2, -1), self.attn.attention_bias(size, q)
        return (logits if bias is None else logits + bias).softmax(-1) @ v


def window_places(size: tuple[int, int], window: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows of windows in a projected map, and those of the map in attended windows.

    NumPy finds them, so that a trace has them as constants.

    Args:
        size (tuple[int, int]): Height H and width W of the map.
        window (int): Side of the windows, in tokens.
        heads (int): Attention heads.

    Returns:
        tuple[np.ndarray, np.ndarray]: For queries, keys and values (3, nW, heads, N), rows among
        (1 + H * W, 3, heads), where token 0 is the padding; for the map (H * W, heads), rows among
        (nW, heads, N).
    """
    padding = [window_padding(side, window) for side in size]
    tokens = np.pad(np.arange(1, size[0] * size[1] + 1).reshape(size), padding)
    tokens = tokens.reshape(window_count(size[0], window), window, -1, window).swapaxes(1, 2)
    tokens = tokens.reshape(-1, 1, window**2)  # (nW, 1, N)
    places = 3 * heads * tokens + np.arange(3 * heads).reshape(3, 1, heads, 1)
    rows = heads * tokens + np.arange(heads)[:, None]  # (nW, heads, N), of the map with token 0
    back = np.zeros(heads * (size[0] * size[1] + 1), dtype=np.int64)
    back[rows.ravel()] = np.arange(rows.size)
    return places, back[heads:].reshape(-1, heads)


def use_map_attention(model: nn.Module, fixed_size: bool = False) -> nn.Module:
    """Replace the attentions of a model by :class:`MapAttention` where they fit, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if MapAttention.fits(child):
                setattr(module, name, MapAttention(child, fixed_size))
    return model

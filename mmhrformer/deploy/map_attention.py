"""Window attention for exported files, which projects as few tokens as possible."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.attention import LocalWindowSelfAttention
from ..ops.recompute import is_plain
from ..ops.windows import window_count, window_merge, window_padding, window_partition
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
        tokens, order = window_tokens((int(H), int(W)), window)  # (nW, N) each
        places, back = window_places(tokens, heads)
        # A token of zeros in front stands for the padding: its keys and values are zero.
        rows = self.qkv(F.pad(x.reshape(B, -1, C), (0, 0, 1, 0))).reshape(B, -1, self.head_dim)
        q, k, v = (rows[:, torch.from_numpy(i)] for i in places)  # (B, nW, heads, M or K, head_dim)
        bias = self.attn.attention_bias((int(H), int(W)), q[0])
        if k.shape[-2] < window**2:
            bias = merge_padding(bias, tokens, order, heads)
        x = attend(q, k, v, bias).reshape(B, -1, self.head_dim)
        return x[:, torch.from_numpy(back)].reshape(B, H, W, C)

    def _permute(self, x: Tensor) -> Tensor:
        """Cut windows and put them together by operations that fit any size."""
        (H, W), window, heads = x.shape[1:3], self.attn.window_size, self.attn.num_heads
        (top, bottom), (left, right) = window_padding(H, window), window_padding(W, window)
        rows, cols = window_count(H, window), window_count(W, window)
        x = F.pad(self.qkv(x), (0, 0, left, right, top, bottom))  # (B, H', W', 3 * C)
        x = x.reshape(-1, rows, window, cols, window, 3, heads, self.head_dim)
        # (3, B * nW, heads, N, head_dim)
        x = x.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, heads, window**2, self.head_dim)
        q, k, v = x.unbind(0)
        x = attend(q, k, v, self.attn.attention_bias((H, W), q))
        x = x.reshape(-1, rows, cols, heads, window, window, self.head_dim)
        x = x.permute(0, 1, 4, 2, 5, 3, 6)  # (B, rows, window, cols, window, heads, head_dim)
        x = x.reshape(-1, rows * window, cols * window, heads * self.head_dim)
        return x[:, top : top + H, left : left + W]


class SingleHeadAttention(nn.Module):
    """:class:`LocalWindowSelfAttention` with a single head, in two projections instead of four.

    The projection of the keys is merged into that of the queries, and the one of the values into
    the output projection, so the windows of the map are their own keys and values. Their biases
    vanish as in :class:`MapAttention`. In onnxruntime 1.31 on one core at 256x192, HRFormer-S,
    whose finest stream has one head, is 1.04 to 1.07 times as fast.

    Args:
        attn (LocalWindowSelfAttention): An attention that :meth:`fits`. It is not changed.
    """

    def __init__(self, attn: LocalWindowSelfAttention) -> None:
        super().__init__()
        self.attn = attn  # computes the bias of the logits
        scale = attn.embed_dims**-0.5
        q, k, v = attn.qkv.weight.double().chunk(3)  # (C, C) each
        bias, _, shift = attn.qkv.bias.double().chunk(3)
        self.query = make_linear(scale * k.T @ q, scale * bias @ k, attn.proj)
        weight = attn.proj.weight.double()
        self.proj = make_linear(weight @ v, attn.proj.bias.double() + weight @ shift, attn.proj)

    @staticmethod
    def fits(attn: nn.Module) -> bool:
        """Whether an attention can be replaced."""
        return MapAttention.fits(attn) and attn.num_heads == 1

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows: transform a map of shape (B, H, W, C) to one of the same shape."""
        size, window = x.shape[1:3], self.attn.window_size
        x = window_partition(x, window)[:, None]  # (B * nW, 1, N, C)
        x = attend(self.query(x), x, x, self.attn.attention_bias(size, x))
        return self.proj(window_merge(x, window, size))  # x[:, 0] would be a copy in onnxruntime


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attend to keys (..., heads, K, head_dim) for queries (..., heads, M, head_dim)."""
    logits = q @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(-1) @ v


def window_tokens(size: tuple[int, int], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Number the tokens of windows; NumPy does so that a trace has them as constants.

    If every window has padding, its other tokens come first, and less is computed: M queries,
    where M is the largest number of those in a window, and M keys and one for all of the padding.
    In onnxruntime 1.31 at 256x192, HRFormer-S and B are 1.01 times as fast.

    Args:
        size (tuple[int, int]): Height H and width W of the map.
        window (int): Side of the windows, in tokens.

    Returns:
        tuple[np.ndarray, np.ndarray]: The tokens of each window, from 1 to H * W and 0 for padding,
        and their places in it; both (nW, N).
    """
    tokens = np.arange(1, size[0] * size[1] + 1).reshape(size)
    tokens = np.pad(tokens, [window_padding(side, window) for side in size])
    tokens = tokens.reshape(window_count(size[0], window), window, -1, window).swapaxes(1, 2)
    tokens = tokens.reshape(-1, window**2)
    has_full = (tokens > 0).all(-1).any()
    order = np.argsort((tokens == 0) & ~has_full, axis=-1, kind='stable')
    return np.take_along_axis(tokens, order, -1), order


def window_places(tokens: np.ndarray, heads: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Find the rows of windows in a projected map, and those of the map in attended windows.

    Args:
        tokens (np.ndarray): The tokens of each window (nW, N), see :func:`window_tokens`.
        heads (int): Attention heads.

    Returns:
        tuple[list[np.ndarray], np.ndarray]: For queries (nW, heads, M), keys and values (nW, heads,
        K), rows among (1 + H * W, 3, heads), where token 0 is the padding; for the map
        (H * W, heads), rows among (nW, heads, M).
    """
    most = (tokens > 0).any(0).sum()  # M
    counts = (most, most + 1, most + 1)  # slices end at N
    places = [
        3 * heads * tokens[:, None, :count] + part * heads + np.arange(heads)[:, None]
        for part, count in enumerate(counts)
    ]
    rows = heads * tokens[:, None, :most] + np.arange(heads)[:, None]  # of the map with token 0
    back = np.zeros(heads * (tokens.max() + 1), dtype=np.int64)
    back[rows.ravel()] = np.arange(rows.size)
    return places, back[heads:].reshape(-1, heads)


def merge_padding(bias: Tensor | None, tokens: np.ndarray, order: np.ndarray, heads: int) -> Tensor:
    """Bias of the logits if one key, of zeros, stands for all of the padding of a window.

    Args:
        bias (Tensor, optional): Bias that broadcasts to (nW, heads, N, N).
        tokens (np.ndarray): The tokens of each window (nW, N), see :func:`window_tokens`.
        order (np.ndarray): Their places in the windows (nW, N).
        heads (int): Attention heads.

    Returns:
        Tensor: Bias of shape (nW, heads, M, M + 1), a constant.
    """
    most = (tokens > 0).any(0).sum()  # M
    full = np.zeros(1) if bias is None else bias.detach().double().numpy()
    full = np.broadcast_to(full, (len(tokens), heads, *tokens.shape[1:] * 2))
    full = np.take_along_axis(full, order[:, None, :most, None], 2)
    full = np.take_along_axis(full, order[:, None, None], 3)  # (nW, heads, M, N)
    inside = tokens[:, None, None] > 0
    with np.errstate(divide='ignore'):  # the logarithm of 0, without padding or with it masked
        padding = np.log(np.exp(full).sum(-1, keepdims=True, where=~inside))
    merged = np.concatenate([np.where(inside, full, -np.inf)[..., :most], padding], -1)
    return torch.from_numpy(merged).float()


def use_map_attention(model: nn.Module, fixed_size: bool = False) -> nn.Module:
    """Replace the attentions of a model by modules for export where these fit, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if SingleHeadAttention.fits(child):
                setattr(module, name, SingleHeadAttention(child))
            elif MapAttention.fits(child):
                setattr(module, name, MapAttention(child, fixed_size))
    return model

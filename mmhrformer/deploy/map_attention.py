"""Window attention for exported files, which projects as few tokens as possible."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.attention import LocalWindowSelfAttention
from ..models.block import HRFormerBlock
from ..ops.recompute import is_plain
from ..ops.windows import window_count, window_merge, window_padding, window_partition
from .fuse import make_linear


class MapAttention(nn.Module):
    """:class:`LocalWindowSelfAttention` that projects the map before padding it.

    The projection of padding, which is the bias, then has to be zero: the bias of the keys adds the
    same number to all logits of a query, which the softmax cancels; that of the values moves to the
    output projection, since attention weights sum to 1; queries of padding are cropped. What
    remains of the biases comes from the normalization before, see :func:`without_bias`. In
    onnxruntime 1.31 on one core at 256x192, HRFormer-S is 1.05 and B 1.07 times as fast; with
    ``fixed_size``, their blocks are 1.05 to 1.07 and 1.04 to 1.05 times as fast once more. Heads
    are padded to a multiple of 4 channels (39 of B to 40: 1.01 times as fast).

    Args:
        attn (LocalWindowSelfAttention): An attention that :func:`fits`. It is not changed.
        norm (nn.LayerNorm): The normalization before it, to be replaced by :func:`shifted_norm`.
        fixed_size (bool): Whether the graph is used with maps of one size only. Rows of windows and
            heads are then gathered by constant indices, which is faster in runtimes than padding,
            permuting and splitting. Defaults to False.
    """

    def __init__(
        self, attn: LocalWindowSelfAttention, norm: nn.LayerNorm, fixed_size: bool = False
    ) -> None:
        super().__init__()
        self.fixed_size = fixed_size
        self.attn = attn  # computes the bias of the logits
        heads, C = attn.num_heads, attn.embed_dims
        missing = -(C // heads) % 4
        self.head_dim = C // heads + missing
        weights, shift = projections(attn, norm)
        weight = torch.cat(weights).view(3, heads, -1, C)
        weight = F.pad(weight, (0, 0, 0, missing)).flatten(0, 2)
        self.qkv = make_linear(weight, None, attn.qkv)
        weight = F.pad(attn.proj.weight.view(C, heads, -1), (0, missing)).flatten(1)
        self.proj = make_linear(weight, shift, attn.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows: transform a map of shape (B, H, W, C) to one of the same shape."""
        H, W, C = x.shape[1:]
        x = self._gather(x) if self.fixed_size else self._permute(x)
        x = self.proj(x.reshape(-1, self.proj.in_features))  # two axes, for Gemm
        return x.reshape(-1, H, W, C)

    def _gather(self, x: Tensor) -> Tensor:
        """Cut windows and put them together by indices that are constant."""
        H, W, C = map(int, x.shape[1:])
        window, heads = self.attn.window_size, self.attn.num_heads
        tokens, order = window_tokens((H, W), window)  # (nW, N) each
        places, back = window_places(tokens, heads)
        # A token of zeros in front stands for the padding: its keys and values are zero.
        rows = self.qkv(F.pad(x.reshape(-1, H * W, C), (0, 0, 1, 0)))
        rows = rows.reshape(-1, (1 + H * W) * 3 * heads, self.head_dim)  # of parts and heads
        q, k, v = (rows[:, torch.from_numpy(i)] for i in places)  # (B, nW, heads, M or K, head_dim)
        bias = self.attn.attention_bias((H, W), q[0])
        if k.shape[-2] < window**2:
            bias = merge_padding(bias, tokens, order, heads)
        x = attend(q, k, v, bias).reshape(-1, places[0].size, self.head_dim)
        return x[:, torch.from_numpy(back)]  # (B, H * W, heads, head_dim)

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
        attn (LocalWindowSelfAttention): An attention that :func:`fits`. It is not changed.
        norm (nn.LayerNorm): The normalization before it, to be replaced by :func:`shifted_norm`.
    """

    def __init__(self, attn: LocalWindowSelfAttention, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.attn = attn  # computes the bias of the logits
        (q, k, v), shift = projections(attn, norm)
        self.query = make_linear(k.T @ q, None, attn.proj)
        self.proj = make_linear(attn.proj.weight.double() @ v, shift, attn.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows: transform a map of shape (B, H, W, C) to one of the same shape."""
        size, window = x.shape[1:3], self.attn.window_size
        x = window_partition(x, window)[:, None]  # (B * nW, 1, N, C)
        x = attend(self.query(x), x, x, self.attn.attention_bias(size, x))
        x = window_merge(x, window, size)  # x[:, 0] would be a copy in onnxruntime
        C = self.attn.embed_dims
        return self.proj(x.reshape(-1, C)).reshape(-1, *size, C)  # two axes, for Gemm


def fits(attn: nn.Module, norm: nn.Module) -> bool:
    """Whether an attention and the normalization before it can be replaced."""
    return (
        type(attn) is LocalWindowSelfAttention
        and is_plain(attn, LocalWindowSelfAttention)
        and all(is_plain(m, nn.Linear) and m.bias is not None for m in (attn.qkv, attn.proj))
        and is_plain(norm, nn.LayerNorm)
        and norm.bias is not None
    )


def shifted_norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    """A layer normalization like another one, with scale 1 and shift 1."""
    shifted = nn.LayerNorm(norm.normalized_shape, norm.eps).to(norm.weight)
    nn.init.ones_(shifted.bias)
    return shifted


def projections(
    attn: LocalWindowSelfAttention, norm: nn.LayerNorm
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Weights of an attention that follows :func:`shifted_norm` and projects padding to zero.

    Args:
        attn (LocalWindowSelfAttention): The attention.
        norm (nn.LayerNorm): The normalization before it, whose scale and shift are included.

    Returns:
        tuple[tuple[Tensor, Tensor, Tensor], Tensor]: Weights (C, C) of queries, which include the
        scale of the logits, keys and values, which have no biases, and the bias (C,) of the output
        projection; in float64.
    """
    scale, shift = norm.weight.double(), norm.bias.double()
    q, k, v = attn.qkv.weight.double().chunk(3)  # (C, C) each
    bias, _, values = attn.qkv.bias.double().chunk(3)
    factor = (attn.embed_dims // attn.num_heads) ** -0.5
    weights = (
        without_bias(factor * q * scale, factor * (q @ shift + bias)),
        without_bias(k * scale, k @ shift),
        without_bias(v * scale, v @ shift),
    )
    return weights, attn.proj.bias.double() + attn.proj.weight.double() @ values


def without_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """Weight of a projection that needs no bias after :func:`shifted_norm`.

    Normalized tokens x have mean 0, so a number added to a row of the weight changes nothing for x,
    but adds C times that number for x + 1. In onnxruntime 1.31 on one core at 256x192, HRFormer-S
    is 1.01 to 1.02 and B 1.02 times as fast without these biases.

    Args:
        weight (Tensor): Weight (D, C) of a projection of x.
        bias (Tensor): Its bias (D,).

    Returns:
        Tensor: Weight (D, C) that projects x + 1 to the same result.
    """
    return weight + ((bias - weight.sum(1)) / weight.shape[1])[:, None]


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
    """Replace attentions and the normalizations before them where they fit, in place."""
    for block in list(model.modules()):
        if not is_plain(block, HRFormerBlock) or not fits(block.attn, block.norm1):
            continue
        attn, norm = block.attn, block.norm1
        if attn.num_heads == 1:
            block.attn = SingleHeadAttention(attn, norm)
        else:
            block.attn = MapAttention(attn, norm, fixed_size)
        block.norm1 = shifted_norm(norm)
    return model

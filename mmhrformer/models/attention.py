"""Self-attention inside local windows (HRFormer, Section 3, "local-window self-attention")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.utils import digit_version
from mmengine.utils.dl_utils import TORCH_VERSION
from torch import Tensor, nn

from ..registry import MODELS
from .recompute import is_compiling
from .strips import map_windows, may_split

# CUDA's attention kernels put the windows on an axis of the grid that has no more places.
MAX_WINDOWS = 65_535
HEAD_DIM_MULTIPLE = 8
CPU_ATTENTION_TAKES_MASKS = digit_version(TORCH_VERSION) >= digit_version('2.3')


def window_count(size: int, window: int) -> int:
    """Windows that an axis needs."""
    # Not -(-size // window): ONNX rounds quotients of negative numbers towards zero.
    return (size + window - 1) // window


def window_padding(size: int, window: int) -> tuple[int, int]:
    """Zeros to add before and after an axis so that windows divide it; the odd one goes last."""
    missing = window_count(size, window) * window - size
    return missing // 2, missing - missing // 2


def is_fixed(*sizes: int) -> bool:
    """Whether sizes are plain numbers, which they are not while a pass is recorded for any size.

    Where ``torch.jit.trace`` or ``torch.export`` record, a decision by the size of the image would
    hold for all others, too, so what only some sizes need is recorded in any case.
    """
    return all(type(size) is int for size in sizes)


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
    if not is_fixed(H, W) or bottom or right:  # there is never more before than after
        if padding is None:
            x = F.pad(x, (0, 0, left, right, top, bottom))
        else:
            inside = x
            x = padding.expand(B, top + H + bottom, left + W + right, C).clone()
            x[:, top : top + H, left : left + W] = inside
    rows, cols = window_count(H, window), window_count(W, window)
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
    rows, cols = window_count(H, window), window_count(W, window)
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
    return window_partition(real, window).flatten(1) == 0


def split_heads(qkv: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """Take queries, keys and values of all heads apart.

    Args:
        qkv (Tensor): What the projection returns, of shape (B * nW, N, 3 * heads * head_dim).
        num_heads (int): Attention heads.
        head_dim (int): Channels of a head.

    Returns:
        Tensor: View of shape (B * nW, N, 3, heads, head_dim).
    """
    # Not unflatten: torch's ONNX exporter would take the number of windows for fixed.
    return qkv.view(*qkv.shape[:2], 3, num_heads, head_dim)


def attend(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Multi-head attention, softmax(q k^T * scale + bias) v, in many windows at a time.

    Args:
        qkv (Tensor): Queries, keys and values of shape (B * nW, N, 3, heads, head_dim).
        bias (Tensor, optional): What to add to the logits; broadcasts to
            (B * nW, heads, N, N).
        scale (float): What to multiply the logits with first.

    Returns:
        Tensor: Weighted sums of the values, of shape (B * nW, N, heads * head_dim).
    """
    head_dim = int(qkv.shape[-1])  # a number also where a pass is recorded
    if is_fixed(qkv.shape[0]) and len(qkv) > MAX_WINDOWS:
        parts = qkv.split(MAX_WINDOWS)
        biases = [bias] * len(parts)
        if bias is not None and len(bias) > 1:
            biases = bias.split(MAX_WINDOWS)
        return torch.cat([attend(part, b, scale) for part, b in zip(parts, biases)])
    qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B * nW, heads, N, head_dim)
    if missing := missing_head_dim(head_dim, qkv.is_cuda):
        qkv = F.pad(qkv, (0, missing))
    q, k, v = qkv.unbind(0)
    if has_one_kernel(qkv, bias):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        # In one pass over the logits, and without copies of queries and keys for backward.
        logits = q @ k.transpose(-2, -1)  # (B * nW, heads, N, N)
        logits = logits * scale if bias is None else torch.add(bias, logits, alpha=scale)
        out = logits.softmax(-1) @ v
    if missing:
        out = out[..., :head_dim]
    return out.transpose(1, 2).flatten(2)


def missing_head_dim(head_dim: int, is_cuda: bool) -> int:
    """How many zeros to add to queries, keys and values for the sake of speed.

    CUDA's fast kernels refuse the head_dim 18 of HRFormer-T and 39 of -B. A CPU is faster on
    aligned rows if little is added: yes for 39, no for 18.

    Args:
        head_dim (int): Channels of a head.
        is_cuda (bool): Whether it is for a GPU.

    Returns:
        int: How many.
    """
    missing = -head_dim % HEAD_DIM_MULTIPLE
    return missing if is_cuda or missing * HEAD_DIM_MULTIPLE <= head_dim else 0


def has_one_kernel(qkv: Tensor, bias: Tensor | None) -> bool:
    """Whether ``scaled_dot_product_attention`` is one kernel here, not the plain formula.

    On a CPU it is not if there is a mask, in torch 2.1 and, for a mask that is learned, in any.
    ONNX has no such kernel, and torch 2.1 cannot write the formula for it with a scale.
    """
    if qkv.device.type != 'cpu' or is_compiling():
        return True
    if bias is None:
        return not torch.onnx.is_in_onnx_export()
    learning = torch.is_grad_enabled() and (bias.requires_grad or qkv.requires_grad)
    return CPU_ATTENTION_TAKES_MASKS and not learning


def may_keep_tensors(parameter: Tensor) -> bool:
    """Whether a result that follows from a parameter may be kept for the next forward pass.

    Not while the forward pass is recorded: the record must hold the computation itself.
    """
    recording = is_compiling() or torch.jit.is_tracing()
    if parameter.is_cuda and not recording:
        recording = torch.cuda.is_current_stream_capturing()
    return not recording and not parameter.is_inference()


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
        self._looked_up = None
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
        if may_split(x) and not self.pad_mask:
            numbers = self.qkv.out_features * windows.shape[1]
            windows = map_windows(lambda part: self._attend(part, size), windows, numbers)
        else:
            windows = self._attend(windows, size)
        return window_merge(windows, self.window_size, size)

    def _attend(self, windows: Tensor, size: tuple[int, int]) -> Tensor:
        head_dim = self.embed_dims // self.num_heads
        qkv = split_heads(self.qkv(windows), self.num_heads, head_dim)
        bias = self.attention_bias(size, qkv)
        return self.proj(attend(qkv, bias, scale=head_dim**-0.5))  # (B * nW, N, C)

    def train(self, mode: bool = True) -> LocalWindowSelfAttention:
        """Set the mode, and forget the bias, which may have been changed behind our back."""
        self._looked_up = None
        return super().train(mode)

    def attention_bias(self, size: tuple[int, int], qkv: Tensor) -> Tensor | None:
        """What is added to the attention logits.

        Args:
            size (tuple[int, int]): Height H and width W of the map without padding.
            qkv (Tensor): Queries, keys and values of shape (B * nW, N, 3, heads, head_dim).

        Returns:
            Tensor | None: Bias that broadcasts to (B * nW, heads, N, N), of qkv's data type, or
            None if there is nothing to add.
        """
        bias = None
        if self.relative_position_bias_table is not None:
            bias = self.relative_position_bias(qkv.dtype)
        divided = is_fixed(*size) and not any(side % self.window_size for side in size)
        if self.pad_mask and not divided:
            padded = padding_mask(size, self.window_size, qkv.device)  # (nW, N)
            mask = torch.zeros_like(padded, dtype=qkv.dtype).masked_fill_(padded, float('-inf'))
            mask = mask.repeat(qkv.shape[0] // mask.shape[0], 1)[:, None, None]  # (B * nW, 1, 1, N)
            bias = mask if bias is None else bias + mask
        return bias

    def relative_position_bias(self, dtype: torch.dtype) -> Tensor:
        """The learned bias of every pair of tokens in a window.

        In evaluation without gradients it is looked up once, and again after the table was
        changed in place, replaced or moved, or the mode was set.

        Args:
            dtype (torch.dtype): Data type of the result.

        Returns:
            Tensor: Bias of shape (1, heads, N, N).
        """
        table = self.relative_position_bias_table
        if self.training or torch.is_grad_enabled() or not may_keep_tensors(table):
            return self._look_up(dtype)
        state = (table.data_ptr(), table._version, table.device, dtype)
        if self._looked_up is None or self._looked_up[0] != state:
            # The table's memory is held on to, so that no other tensor gets its address.
            self._looked_up = (state, table.detach(), self._look_up(dtype))
        return self._looked_up[2]

    def _look_up(self, dtype: torch.dtype) -> Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index]  # (N, N, heads)
        return bias.permute(2, 0, 1)[None].to(dtype).contiguous()

"""Window attention by torch's fused attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def window_attention(qkv: Tensor, bias: Tensor | None, scale: float, padding: int = 0) -> Tensor:
    """:func:`mmhrformer.ops.window_attention` by ``scaled_dot_product_attention``.

    Args:
        qkv (Tensor): See :func:`mmhrformer.ops.window_attention`.
        bias (Tensor, optional): See there.
        scale (float): See there.
        padding (int): Zeros to append to each query, key and value, for kernels that need other
            head dims. Defaults to 0.

    Returns:
        Tensor: Weighted sums of the values, of shape (B * nW, N, heads * head_dim).
    """
    head_dim = int(qkv.shape[-1])
    qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B * nW, heads, N, head_dim)
    if padding:
        qkv = F.pad(qkv, (0, padding))
    q, k, v = qkv.unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if padding:
        out = out[..., :head_dim]
    return out.transpose(1, 2).flatten(2)

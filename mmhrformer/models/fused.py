"""A model with everything folded that is constant once the weights are (deployment)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from mmcv.cnn.utils import fuse_conv_bn
from torch import Tensor, nn

from .attention import LocalWindowSelfAttention, window_merge, window_partition
from .block import HRFormerBlock

# Below this a scale of layer normalization cannot be undone for the padding.
SMALLEST_SCALE = 1e-3


class FusedWindowAttention(nn.Module):
    """:class:`LocalWindowSelfAttention` and the layer normalization in front, for inference.

    The scale and shift of the normalization and the scale of the queries are in the projection,
    the relative position bias is looked up already. Padding is zero *after* the normalization, so
    here it gets the value that the scale and shift would bring to zero.

    Args:
        attn (LocalWindowSelfAttention): The attention.
        norm (nn.LayerNorm): The normalization.
    """

    def __init__(self, attn: LocalWindowSelfAttention, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.window_size = attn.window_size
        self.num_heads = attn.num_heads
        self.qkv = nn.Linear(attn.embed_dims, 3 * attn.embed_dims)
        self.proj = attn.proj
        weight, bias = attn.qkv.weight.double(), attn.qkv.bias.double()
        scale, shift = norm.weight.double(), norm.bias.double()
        bias = bias + weight @ shift
        weight = weight * scale
        queries = slice(0, attn.embed_dims)
        weight[queries] *= (attn.embed_dims // attn.num_heads) ** -0.5
        bias[queries] *= (attn.embed_dims // attn.num_heads) ** -0.5
        self.qkv.weight.data.copy_(weight)
        self.qkv.bias.data.copy_(bias)
        self.register_buffer('padding', (-shift / scale).to(attn.qkv.weight))
        table = attn.attention_bias((attn.window_size,) * 2, attn.qkv.weight)
        self.register_buffer('bias', None if table is None else table.contiguous())

    @staticmethod
    def fits(attn: nn.Module, norm: nn.Module) -> bool:
        """Whether an attention and a normalization can be folded."""
        return (
            type(attn) is LocalWindowSelfAttention
            and not attn.pad_mask
            and isinstance(norm, nn.LayerNorm)
            and norm.weight.abs().min() > SMALLEST_SCALE
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows.

        Args:
            x (Tensor): Normalized map of shape (B, H, W, C), without scale and shift.

        Returns:
            Tensor: Map of the same shape.
        """
        size = x.shape[1:3]
        windows = window_partition(x, self.window_size, self.padding)  # (B * nW, N, C)
        qkv = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B * nW, heads, N, head_dim) each
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=1.0)
        windows = self.proj(out.transpose(1, 2).flatten(2))
        return window_merge(windows, self.window_size, size)


def refuse_training(self: nn.Module, mode: bool = True) -> nn.Module:
    """Stand for ``train`` of a folded model: without batch normalization it cannot be trained."""
    if mode:
        raise RuntimeError(
            'this model was made by fuse_for_inference and cannot be trained: train the model it '
            'was made from'
        )
    return self


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """Fold what is constant in a trained model, for faster inference with equal results.

    Batch normalization goes into the convolutions, layer normalization and the scale of the
    queries into the projections of the attention, and the relative position biases are looked up.

    Args:
        model (nn.Module): A classifier, pose estimator or segmentor with an HRFormer backbone, or
            a bare :class:`HRFormer`. It is left as it is.

    Returns:
        nn.Module: A folded copy, in evaluation mode, without gradients. Calling its ``train()``
        is an error.

    Examples:
        >>> from mmhrformer import HRFormer
        >>> model = HRFormer(arch='tiny')
        >>> _ = model.eval()
        >>> fused = fuse_for_inference(model)
        >>> x = torch.rand(1, 3, 64, 64)
        >>> torch.allclose(model(x)[0], fused(x)[0], atol=1e-4)
        True
    """
    fused = copy.deepcopy(model)
    fused.train(False)
    with torch.no_grad():
        for block in [module for module in fused.modules() if isinstance(module, HRFormerBlock)]:
            if FusedWindowAttention.fits(block.attn, block.norm1):
                block.attn = FusedWindowAttention(block.attn, block.norm1)
                channels, eps = block.norm1.normalized_shape, block.norm1.eps
                block.norm1 = nn.LayerNorm(channels, eps, elementwise_affine=False)
        fused = fuse_conv_bn(fused)
    fused.requires_grad_(False)
    fused.train(False)
    for module in fused.modules():
        module.train = refuse_training.__get__(module)
    return fused

"""A model with everything folded that is constant once the weights are (deployment)."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from mmcv.cnn.utils import fuse_conv_bn
from mmengine.utils import digit_version
from mmengine.utils.dl_utils import TORCH_VERSION
from torch import Tensor, nn

from .attention import (
    LocalWindowSelfAttention,
    attend,
    missing_head_dim,
    split_heads,
    window_merge,
    window_partition,
)
from .block import HRFormerBlock
from .ffn import DWConvFFN
from .recompute import is_compiling
from .strips import map_strips, map_windows, may_split

# The CPU library's convolution with an activation at its end, which torch.compile uses, too.
ONEDNN_CONVOLUTION = None
if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_convolution_pointwise'):
    ONEDNN_CONVOLUTION = torch.ops.mkldnn._convolution_pointwise.default

# torch 2.4 got the second name and deprecated the first.
is_autocast_on_cpu = torch.is_autocast_cpu_enabled
if digit_version(TORCH_VERSION) >= digit_version('2.4'):
    is_autocast_on_cpu = partial(torch.is_autocast_enabled, 'cpu')

# Below this a scale of layer normalization cannot be undone for the padding.
SMALLEST_SCALE = 1e-3


def make_linear(weight: Tensor, bias: Tensor, like: nn.Linear) -> nn.Linear:
    """A linear layer of given weights, on the device and of the data type of another one."""
    linear = nn.Linear(weight.shape[1], weight.shape[0]).to(like.weight)
    linear.weight.data.copy_(weight)
    linear.bias.data.copy_(bias)
    return linear


class FusedWindowAttention(nn.Module):
    """:class:`LocalWindowSelfAttention` and the layer normalization in front, for inference.

    The scale and shift of the normalization and the scale of the queries are in the projection,
    heads are as wide as the kernels like them, the relative position bias is looked up already.
    Padding is zero *after* the normalization, so here it gets the value that the scale and shift
    would bring to zero.

    Args:
        attn (LocalWindowSelfAttention): The attention.
        norm (nn.LayerNorm): The normalization.
    """

    def __init__(self, attn: LocalWindowSelfAttention, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.window_size = attn.window_size
        self.num_heads = attn.num_heads
        channels, head_dim = attn.embed_dims, attn.embed_dims // attn.num_heads
        missing = missing_head_dim(head_dim, is_cuda=False)
        self.head_dim = head_dim + missing
        weight, bias = attn.qkv.weight.double(), attn.qkv.bias.double()
        scale, shift = norm.weight.double(), norm.bias.double()
        bias = bias + weight @ shift
        weight = weight * scale
        weight = weight.view(3, attn.num_heads, head_dim, channels)
        bias = bias.view(3, attn.num_heads, head_dim)
        queries = torch.tensor([head_dim**-0.5, 1, 1]).to(weight)  # only they are scaled
        weight = F.pad(weight * queries.view(3, 1, 1, 1), (0, 0, 0, missing)).flatten(0, 2)
        bias = F.pad(bias * queries.view(3, 1, 1), (0, missing)).flatten()
        self.qkv = make_linear(weight, bias, attn.qkv)
        weight = attn.proj.weight.view(channels, attn.num_heads, head_dim)
        self.proj = make_linear(F.pad(weight, (0, missing)).flatten(1), attn.proj.bias, attn.proj)
        self.register_buffer('padding', (-shift / scale).to(attn.qkv.weight))
        bias = None
        if attn.relative_position_bias_table is not None:
            bias = attn.relative_position_bias(attn.qkv.weight.dtype)
        self.register_buffer('bias', bias)

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
        if may_split(x):
            windows = map_windows(self._attend, windows, self.qkv.out_features * windows.shape[1])
        else:
            windows = self._attend(windows)
        return window_merge(windows, self.window_size, size)

    def _attend(self, windows: Tensor) -> Tensor:
        qkv = split_heads(self.qkv(windows), self.num_heads, self.head_dim)
        return self.proj(attend(qkv, self.bias, scale=1.0))  # (B * nW, N, C)


class FusedDWConvFFN(nn.Module):
    """:class:`DWConvFFN` after its normalizations were folded, for inference.

    Args:
        ffn (DWConvFFN): The FFN.
    """

    def __init__(self, ffn: DWConvFFN) -> None:
        super().__init__()
        self.fc1, self.dw3x3, self.fc2 = ffn.fc1, ffn.dw3x3, ffn.fc2

    @staticmethod
    def fits(ffn: nn.Module) -> bool:
        """Whether an FFN can be replaced: all its normalizations are folded."""
        return type(ffn) is DWConvFFN and all(
            type(norm) is nn.Identity for norm in (ffn.norm1, ffn.norm2, ffn.norm3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map of shape (B, H, W, C) to one of the same shape."""
        if may_split(x):
            return map_strips(self._forward, x, self.fc1.out_channels)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)  # (B, C, H, W), channels-last in memory: nothing is copied
        for conv in (self.fc1, self.dw3x3, self.fc2):
            x = conv_gelu(x, conv)
        return x.permute(0, 2, 3, 1)


def conv_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Compute ``gelu(conv(x))``, on a CPU in one pass.

    Args:
        x (Tensor): Map of shape (B, C, H, W).
        conv (nn.Conv2d): The convolution.

    Returns:
        Tensor: Map of shape (B, out_channels, H', W').
    """
    recorded = is_compiling() or torch.jit.is_tracing()
    plain = x.device.type != 'cpu' or x.dtype != torch.float32 or x.requires_grad
    # Autocast knows nothing of the kernel, which would go on in float32.
    if ONEDNN_CONVOLUTION is None or recorded or plain or is_autocast_on_cpu():
        return F.gelu(conv(x))
    options = (conv.padding, conv.stride, conv.dilation, conv.groups, 'gelu', [], 'none')
    return ONEDNN_CONVOLUTION(x, conv.weight, conv.bias, *options)


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
        for block in [module for module in fused.modules() if isinstance(module, HRFormerBlock)]:
            if FusedDWConvFFN.fits(block.ffn):
                block.ffn = FusedDWConvFFN(block.ffn)
    fused.requires_grad_(False)
    fused.train(False)
    for module in fused.modules():
        module.train = refuse_training.__get__(module)
    return fused

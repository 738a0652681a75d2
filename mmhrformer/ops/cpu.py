"""Backend for CPUs. The comments give the gains; see also docs/benchmarks.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.utils import digit_version
from mmengine.utils.dl_utils import TORCH_VERSION
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import recompute, reference, sdpa
from .state import autocast_dtype, needs_grad

# Inference of HRFormer-S takes 1.02 to 1.08 times as long without it. Before torch 2.3, SDPA with a
# mask falls back to separate operators, slower than ours.
HAS_MASKED_SDPA = digit_version(TORCH_VERSION) >= digit_version('2.3')
# A training step of HRFormer-S takes 3.4 times as long without it on torch 2.1, where the backward
# pass of a depth-wise convolution takes 6 to 25 times as long on channels-last memory. On torch
# 2.13 it takes a third to two thirds as long. The versions in between were not measured.
DEPTHWISE_BACKWARD_IS_CONTIGUOUS = digit_version(TORCH_VERSION) < digit_version('2.13')
# oneDNN's convolution with a fused activation, which torch.compile uses as well. Without it, folded
# HRFormer-S takes 1.07 to 1.09 times as long (batch 8, 512x1024; one image of 256x192: 1.0).
# Before version 3.4, which came with torch 2.4, oneDNN may read the activation after it was freed:
# processes that ran many shapes crashed on torch 2.1.
ONEDNN_CONVOLUTION = None
if (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, '_convolution_pointwise')
    and digit_version(TORCH_VERSION) >= digit_version('2.4')
):
    ONEDNN_CONVOLUTION = torch.ops.mkldnn._convolution_pointwise.default


def head_padding(head_dim: int) -> int:
    """Number of zeros to append to each head for a multiple of 8: 1 for 39, but none for 18.

    Without them, folded HRFormer-B takes 1.02 (one image) to 1.08 times as long (eight images,
    torch 2.13).
    """
    missing = -head_dim % 8
    return missing if missing * 8 <= head_dim else 0


def window_attention(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """See :func:`mmhrformer.ops.window_attention`."""
    head_dim = qkv.shape[-1]
    padding = head_padding(head_dim)
    if bias is None or (HAS_MASKED_SDPA and not needs_grad(qkv, bias)):
        return sdpa.window_attention(qkv, bias, scale, padding)
    if not padding:
        return reference.window_attention(qkv, bias, scale)
    out = reference.window_attention(F.pad(qkv, (0, padding)), bias, scale)
    return out.unflatten(-1, (-1, head_dim + padding))[..., :head_dim].flatten(2)


class ContiguousBackward(torch.autograd.Function):
    """Depth-wise convolution whose backward pass runs on contiguous memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        """See :func:`mmhrformer.ops.depthwise_conv`."""
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.has_bias = stride, bias is not None
        with torch.autocast('cpu', enabled=False):
            return reference.depthwise_conv(x, weight, bias, stride)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the map, of shape (B, C, H, W), the weight and the bias."""
        x, weight = ctx.saved_tensors
        is_contiguous = x.is_contiguous()
        x, grad = x.contiguous(), grad.contiguous()  # also releases recomputed tensors
        C = len(weight)
        # With one input channel, both memory formats of the weight have the same layout but
        # different strides, and torch decides by the strides.
        weight = weight.reshape(-1).view(weight.shape)
        options = ([ctx.stride] * 2, [1, 1], [1, 1], False, [0, 0], C)
        wanted = [*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]]
        grads = torch.ops.aten.convolution_backward(grad, x, weight, [C], *options, wanted)
        if grads[0] is None or is_contiguous:
            return *grads, None
        del x, grad
        return grads[0].contiguous(memory_format=torch.channels_last), *grads[1:], None


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """See :func:`mmhrformer.ops.depthwise_conv`."""
    if DEPTHWISE_BACKWARD_IS_CONTIGUOUS and needs_grad(x, weight, bias):
        tensors = [x, weight, bias]
        if dtype := autocast_dtype('cpu'):
            tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        return ContiguousBackward.apply(*tensors, stride)
    return reference.depthwise_conv(x, weight, bias, stride)


def conv_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """See :func:`mmhrformer.ops.conv_gelu`."""
    # Autocast does not apply to this operator, which would run in float32.
    if x.dtype != torch.float32 or needs_grad(x, conv.weight) or autocast_dtype('cpu'):
        return reference.conv_gelu(x, conv)
    if ONEDNN_CONVOLUTION is None:
        return torch.ops.aten.gelu_(conv._conv_forward(x, conv.weight, conv.bias))
    options = (conv.padding, conv.stride, conv.dilation, conv.groups, 'gelu', [], 'none')
    return ONEDNN_CONVOLUTION(x, conv.weight, conv.bias, *options)


def norm_gelu_conv(x: Tensor, norm: nn.Module, conv: nn.Module | None = None) -> Tensor:
    """See :func:`mmhrformer.ops.norm_gelu_conv`.

    In inference GELU runs in place. Otherwise HRFormer-S takes 1.06 to 1.07 times as long at
    512x1024 (256x192: 1.00).
    """
    if torch.is_grad_enabled() or not recompute.is_plain(norm, _BatchNorm):
        return recompute.norm_gelu_conv(x, norm, conv)
    x = torch.ops.aten.gelu_(norm(x).contiguous(memory_format=torch.channels_last))
    return x if conv is None else conv(x)

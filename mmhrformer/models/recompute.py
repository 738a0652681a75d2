"""Training with fewer activations kept: what is cheap is computed again in the backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.utils import digit_version
from mmengine.utils.dl_utils import TORCH_VERSION
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

# Whether torch.compile (or torch.export) is reading the code; public since torch 2.3.
is_compiling = getattr(torch.compiler, 'is_compiling', torch._utils.is_compiling)

# The CPU's backward pass of a depth-wise convolution: torch 2.1 takes 6 to 25 times longer on
# channels-last memory than on contiguous memory, torch 2.13 a third to two thirds of the time.
# The versions between were not measured.
CPU_DEPTHWISE_BACKWARD_IS_CONTIGUOUS = digit_version(TORCH_VERSION) < digit_version('2.13')

gelu_backward = torch.ops.aten.gelu_backward.default
convolution_backward = torch.ops.aten.convolution_backward.default
batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def batch_statistics_args(norm: _BatchNorm) -> tuple[bool, float]:
    """Count a batch as :class:`_BatchNorm` does.

    Args:
        norm (_BatchNorm): The normalization.

    Returns:
        tuple[bool, float]: Whether to use the statistics of the batch, and how much the running
        ones move towards them.
    """
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    return norm.training, momentum


class NormGELUConv(torch.autograd.Function):
    """Batch normalization, GELU and convolution, of which only the input is kept.

    The usual backward pass needs the inputs of all three, which are equally large. Here the
    outputs of the normalization and of the GELU are computed again: two passes over a map.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: _BatchNorm | None,
        conv: nn.Conv2d | None,
    ) -> Tensor:
        """Compute ``conv(gelu(norm(x)))``, without ``norm`` or ``conv`` if it is None.

        Args:
            ctx: Where autograd keeps what the backward pass needs.
            x (Tensor): Map of shape (B, C, H, W).
            gamma (Tensor | None): Scale of the normalization, of shape (C,).
            beta (Tensor | None): Shift of the normalization, of shape (C,).
            weight (Tensor | None): Weight of the convolution.
            bias (Tensor | None): Bias of the convolution.
            norm (_BatchNorm | None): Whose running statistics to use and update.
            conv (nn.Conv2d | None): Stride, padding and groups of the convolution.

        Returns:
            Tensor: Map of shape (B, out_channels, H', W').
        """
        mean = invstd = None
        ctx.norm, ctx.conv = norm, conv
        if norm is None:
            out = F.gelu(x)
        else:
            ctx.training, momentum = batch_statistics_args(norm)
            running = norm.running_mean, norm.running_var
            y, mean, invstd = torch.native_batch_norm(
                x, gamma, beta, *running, ctx.training, momentum, norm.eps
            )
            if not ctx.training:
                mean, invstd = norm.running_mean.clone(), (norm.running_var + norm.eps).rsqrt()
            out = torch.ops.aten.gelu_(y)
        ctx.save_for_backward(x, gamma, beta, weight, bias, mean, invstd)
        if conv is not None:
            # Autocast chose the data type of x already; in here it has no say.
            with torch.autocast(x.device.type, enabled=False):
                out = conv._conv_forward(out, weight.to(out.dtype), _to(bias, out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the five tensors."""
        x, gamma, beta, weight, bias, mean, invstd = ctx.saved_tensors
        y = x
        if ctx.norm is not None:
            eps = ctx.norm.eps
            var = invstd.pow(-2) - eps
            y = F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps)
        grad_weight = grad_bias = None
        if ctx.conv is not None:
            wanted = (True, *ctx.needs_input_grad[3:5])
            grads = conv_gradients(grad, F.gelu(y), weight.to(y.dtype), wanted, ctx.conv)
            grad, grad_weight, grad_bias = grads[0], _to(grads[1], weight), _to(grads[2], bias)
        # With input and gradient in different layouts torch 2.1's CPU GELU is silently wrong.
        grads = (gelu_backward(_like(grad, y), y), None, None)
        if ctx.norm is not None:
            statistics = (None, None, mean, invstd) if ctx.training else (mean, var, None, None)
            wanted = list(ctx.needs_input_grad[:3])
            grads = batch_norm_backward(
                _like(grads[0], x), x, gamma, *statistics, ctx.training, eps, wanted
            )
        grads = [g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad)]
        return *grads, grad_weight, grad_bias, None, None


def plainly_strided(weight: Tensor) -> Tensor:
    """A depth-wise weight that no convolution takes for a channels-last one.

    In both layouts its one input channel lies the same, but the strides that say so differ, and
    torch goes by them.
    """
    return weight.reshape(-1).view(weight.shape)


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...], conv: nn.Conv2d
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of a convolution, in the memory layout that is fast for it.

    Args:
        grad (Tensor): Gradient of the output, of shape (B, out_channels, H', W').
        x (Tensor): The input, of shape (B, in_channels, H, W).
        weight (Tensor): The weight.
        wanted (tuple[bool, ...]): Which of the gradients of input, weight and bias to compute.
        conv (nn.Conv2d): Stride, padding, dilation and groups.

    Returns:
        tuple[Tensor, Tensor | None, Tensor | None]: Gradients of input, weight and bias.
    """
    depthwise = conv.groups == x.shape[1] > 1
    if depthwise and x.device.type == 'cpu' and CPU_DEPTHWISE_BACKWARD_IS_CONTIGUOUS:
        grad, x, weight = grad.contiguous(), x.contiguous(), plainly_strided(weight)
    else:
        grad = grad.contiguous(memory_format=torch.channels_last)
    options = (list(conv.stride), list(conv.padding), list(conv.dilation), False, [0, 0])
    return convolution_backward(
        grad, x, weight, [conv.out_channels], *options, conv.groups, list(wanted)
    )


def _to(tensor: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The tensor, if there is one, in the data type of another."""
    return None if tensor is None else tensor.to(other.dtype)


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor in the memory layout of another of the same shape."""
    channels_last = other.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


def may_recompute() -> bool:
    """Whether there will be a backward pass, and nobody else decides what to compute again."""
    return torch.is_grad_enabled() and not is_compiling() and not torch.jit.is_tracing()


def norm_gelu_conv(x: Tensor, norm: nn.Module, conv: nn.Conv2d | None = None) -> Tensor:
    """Compute ``conv(gelu(norm(x)))`` with little kept for the backward pass.

    Args:
        x (Tensor): Map of shape (B, C, H, W).
        norm (nn.Module): The normalization. Of batch normalization only the input is kept, of
            others, such as the synchronized one, their output, too.
        conv (nn.Conv2d, optional): The convolution. Defaults to None: none.

    Returns:
        Tensor: Map of shape (B, out_channels, H', W').
    """
    weight, bias = (None, None) if conv is None else (conv.weight, conv.bias)
    # mmengine replaces synchronized norms by a class of its own when there is one process.
    plain = getattr(type(norm), 'forward', None) is _BatchNorm.forward
    if plain and norm.affine and norm.track_running_stats:
        return NormGELUConv.apply(x, norm.weight, norm.bias, weight, bias, norm, conv)
    return NormGELUConv.apply(norm(x), None, None, weight, bias, None, conv)

"""The FFN in training as one autograd node, from the kernels of its parts and cuBLAS products.

Import this only where Triton is installed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton_conv import depthwise_forward, depthwise_input_grad, depthwise_weight_grad
from .triton_norm import gradient_sums, input_gradient, normalize, share
from .triton_support import refuse_second_derivatives


def to_map(rows: Tensor) -> Tensor:
    """Rows (B, H, W, C) as a channels-last map (B, C, H, W)."""
    return rows.permute(0, 3, 1, 2)


def to_rows(x: Tensor) -> Tensor:
    """The inverse of :func:`to_map`."""
    return x.permute(0, 2, 3, 1)


def is_depthwise(weight: Tensor) -> bool:
    """Whether a weight is that of the 3x3 convolution, not of a 1x1 convolution."""
    return weight.shape[-1] == 3


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve a map (B, K, H, W) to (B, N, H, W), by a weight of 1x1 or 3x3 depth-wise."""
    if is_depthwise(weight):
        return depthwise_forward(x, weight, bias, 1, False)
    return to_map(F.linear(to_rows(x), weight.flatten(1), bias))


def convolution_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the input (B, K, H, W), from that of the output (B, N, H, W)."""
    if is_depthwise(weight):
        return depthwise_input_grad(grad, weight)
    return to_map(to_rows(grad) @ weight.flatten(1))


def convolution_weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, of_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, in their memory layout; ``of_bias`` is the latter if known."""
    if is_depthwise(weight):
        return depthwise_weight_grad(grad, x, weight, bias)
    rows = to_rows(grad).flatten(0, 2)  # (B * H * W, N)
    of_weight = rows.T @ to_rows(x).flatten(0, 2)
    of_weight = of_weight.as_strided(weight.shape, (*of_weight.stride(), *weight.stride()[2:]))
    return of_weight, rows.sum(0) if of_bias is None else of_bias


class ConvFFN(torch.autograd.Function):
    """See :func:`mmhrformer.ops.kernels.conv_ffn`.

    The input and the outputs of the three convolutions are kept. Everything in between is
    recomputed by the kernel that reads the same map for the gradients of a normalization.
    """

    @staticmethod
    def forward(ctx, measure: list[Callable], x: Tensor, *parameters: Tensor) -> Tensor:
        """Transform a map (B, C, H, W) to one of the same shape.

        The parameters are, three times, weight and bias of a convolution and of the normalization
        after it. ``measure`` has three functions that return the results of ``measure_map``.
        """
        ctx.norms, kept = [], [x, *parameters]
        for i, statistics_of in enumerate(measure):
            weight, bias, *affine = parameters[4 * i : 4 * i + 4]
            y = convolve(x, weight, bias)
            statistics, *norm = statistics_of(y)
            x = normalize(y, *statistics, *affine, *norm[1:])
            ctx.norms.append(norm)
            kept += [y, *statistics]
        ctx.save_for_backward(*kept)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the map and the parameters."""
        refuse_second_derivatives('conv_ffn')
        x, *kept = ctx.saved_tensors
        parameters, maps = kept[:12], kept[12:]
        grads, later = [], None
        for i in (2, 1, 0):
            weight, bias, *affine = parameters[4 * i : 4 * i + 4]
            group, eps, training = ctx.norms[i]
            saved = *maps[4 * i : 4 * i + 4], *affine
            total, of_affine, zeros, z = gradient_sums(grad, *saved, eps, training, i < 2)
            if later:
                grads[:0] = convolution_weight_grad(later[0], z, *later[1:])
            total = share(total, group) if training else None
            grad = input_gradient(grad, *saved, total, eps, training)
            # Batch statistics cancel the bias, so its gradient is zero.
            later = grad, weight, bias, zeros if training and group is None else None
            grads[:0] = of_affine[1], of_affine[0]
            if i or ctx.needs_input_grad[1]:
                grad = convolution_input_grad(grad, weight)
        grads[:0] = convolution_weight_grad(later[0], x, *later[1:])
        return None, grad if ctx.needs_input_grad[1] else None, *grads

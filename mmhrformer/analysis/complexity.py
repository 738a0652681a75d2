"""Parameters and operations of a model, counted two ways.

``macs`` are the multiply-accumulates of convolutions, linear layers and attention products (in
the backbone and in the OCR head).
``flops_official`` follows the counter of the official code, whose results the paper gives
(Table 6): the same, plus 1 for each bias of a linear layer, 4 for each value of a batch
normalization, 5 for each of a softmax, and 1 for each of a ReLU, sum, product or dropout; GELU,
layer normalization, padding and resizing are free.
:func:`analyzed_macs` has the former counted by mmengine instead, which knows nothing of our
modules.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from collections.abc import Callable

import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.attention import LocalWindowSelfAttention
from ..models.block import Bottleneck, HRFormerBlock
from ..models.ffn import DWConvFFN
from ..models.fusion_neck import HRFormerFusion
from ..models.hr_module import HRModule
from ..ops import use


def _conv(module: nn.Conv2d, x: Tensor, out: Tensor) -> dict:
    return dict(macs=out.numel() * module.weight[0].numel())


def _linear(module: nn.Linear, x: Tensor, out: Tensor) -> dict:
    return dict(macs=x.numel() * module.out_features, linear_bias=out.numel())


def _deconv(module: nn.ConvTranspose2d, x: Tensor, out: Tensor) -> dict:
    return dict(macs=x.numel() * module.weight[0].numel())


def _stock_attention(module: nn.Module, x: Tensor, out: Tensor) -> dict:
    """Of mmpretrain's transformers: (B, N, C), where B counts windows, too."""
    weights = x.shape[0] * module.num_heads * x.shape[1] ** 2
    has_bias = hasattr(module, 'relative_position_bias_table')
    return dict(
        macs=2 * x.numel() * x.shape[1],
        softmax=5 * weights,
        elementwise=x.numel() + weights * has_bias + weights,
    )


def _attention(module: LocalWindowSelfAttention, x: Tensor, out: Tensor) -> dict:
    B, H, W, C = x.shape
    window = module.window_size
    windows = B * -(-H // window) * -(-W // window)
    tokens = window * window
    weights = windows * module.num_heads * tokens * tokens
    has_bias = module.relative_position_bias_table is not None
    return dict(
        macs=2 * windows * tokens * tokens * C,
        softmax=5 * weights,
        # Scaling the queries, adding the bias, dropout of the attention weights.
        elementwise=windows * tokens * C + weights * has_bias + weights,
    )


def _ffn(module: DWConvFFN, x: Tensor, out: Tensor) -> dict:
    return dict(ffn_dropout=out.numel() + out.numel() // x.shape[-1] * module.feedforward_channels)


def _hr_module(module: HRModule, xs: list[Tensor], outs: list[Tensor | None]) -> dict:
    kept = [out for out in outs if out is not None]
    return dict(elementwise=sum(out.numel() * (len(xs) - 1) for out in kept))


def _fusion(module: HRFormerFusion, xs: list[Tensor], outs: tuple[Tensor]) -> dict:
    widths = [bottleneck[0].conv3.out_channels for bottleneck in module.incre_modules]
    return dict(elementwise=sum(w * x[:, 0].numel() for w, x in zip(widths[1:], xs[1:])))


def _object_attention(module: nn.Module, pixels: Tensor, regions: Tensor, out: Tensor) -> dict:
    """Of the OCR head: gathering regions from pixels, and the attention of pixels to regions."""
    B, C, H, W = pixels.shape
    weights = B * H * W * regions.shape[2]
    key_channels = module.f_down[0][0].out_channels
    return dict(
        macs=weights * (C + 2 * key_channels),
        softmax=2 * 5 * weights,
        elementwise=2 * weights,  # scaling
    )


# The operators that multiply and accumulate, as mmengine's analysis calls them.
PRODUCTS = ('conv', 'linear', 'addmm', 'mm', 'matmul', 'bmm', 'einsum')

COUNTERS: dict[type, Callable] = {
    nn.Conv2d: _conv,
    nn.ConvTranspose2d: _deconv,
    nn.Linear: _linear,
    _BatchNorm: lambda module, x, out: dict(batch_norm=4 * out.numel()),
    nn.ReLU: lambda module, x, out: dict(elementwise=out.numel()),
    LocalWindowSelfAttention: _attention,
    HRFormerBlock: lambda module, x, out: dict(elementwise=2 * out.numel()),
    Bottleneck: lambda module, x, out: dict(elementwise=out.numel()),
    DWConvFFN: _ffn,
    HRModule: _hr_module,
    HRFormerFusion: _fusion,
}


def count_operations(model: nn.Module, shape: tuple[int, ...]) -> Counter:
    """Count the operations of one forward pass (``mode='tensor'``), by kind.

    Args:
        model (nn.Module): A model built from a config, or a backbone.
        shape (tuple[int, ...]): Shape (B, C, H, W) of the input.

    Returns:
        Counter: Operations by kind: ``macs``, ``linear_bias``, ``batch_norm``, ``softmax``,
        ``elementwise``, and ``ffn_dropout``, which only the official classification code has.
    """
    total: Counter = Counter()

    def hook(counter: Callable):
        def count(module, args, out):
            if args:
                total.update(counter(module, *args, out))

        return count

    model = revert_sync_batchnorm(copy.deepcopy(model)).eval()
    counters = dict(COUNTERS)
    if ocr_head := sys.modules.get('mmhrformer.models.ocr_head'):  # needs mmseg
        counters[ocr_head.ObjectAttention] = _object_attention
    if stock := sys.modules.get('mmpretrain.models.utils.attention'):
        counters[stock.WindowMSA] = counters[stock.MultiheadAttention] = _stock_attention
    for module in model.modules():
        for kind, counter in counters.items():
            if isinstance(module, kind):
                module.register_forward_hook(hook(counter))
    whole_model = hasattr(model, 'backbone')
    with torch.no_grad(), use('reference'):
        model(torch.zeros(shape), *([None] if whole_model else []))
    return total


def input_shape(model: nn.Module, height: int = 224, width: int = 224) -> tuple[int, ...]:
    """Shape of one image of a model, with the channels that its first convolution takes.

    Args:
        model (nn.Module): A model built from a config, or a backbone.
        height (int): Height of the image. Defaults to 224.
        width (int): Width of the image. Defaults to 224.

    Returns:
        tuple[int, ...]: (1, C, H, W).
    """
    modules = getattr(model, 'backbone', model).modules()
    channels = next((m.in_channels for m in modules if isinstance(m, nn.Conv2d)), 3)
    return 1, channels, height, width


def complexity(model: nn.Module, shape: tuple[int, ...] | None = None) -> dict[str, int]:
    """Count parameters, multiply-accumulates and FLOPs by the official rule.

    Args:
        model (nn.Module): A model built from a config, or a backbone.
        shape (tuple[int, ...], optional): Shape (B, C, H, W) of the input. Defaults to None:
            one image of 224x224.

    Returns:
        dict[str, int]: ``parameters``, ``macs`` and ``flops_official``.
    """
    counts = count_operations(model, shape or input_shape(model))
    flops = sum(counts.values())
    if not any(isinstance(module, HRFormerFusion) for module in model.modules()):
        flops -= counts['ffn_dropout']
    parameters = sum(p.numel() for p in model.parameters())
    return dict(parameters=parameters, macs=counts['macs'], flops_official=flops)


def analyzed_macs(model: nn.Module, shape: tuple[int, ...] | None = None) -> int:
    """Count multiply-accumulates by mmengine's analysis of the traced graph.

    Its own total also has normalization, pooling and resizing in it, which are no
    multiply-accumulates and are left out here. What is computed is counted, including the zeros
    that fill up the heads of the attention.

    Args:
        model (nn.Module): A model built from a config, or a backbone.
        shape (tuple[int, ...], optional): Shape (B, C, H, W) of the input. Defaults to None:
            one image of 224x224.

    Returns:
        int: Those of convolutions, linear layers and matrix products.
    """
    model = revert_sync_batchnorm(copy.deepcopy(model)).eval()
    inputs = (
        torch.zeros(shape or input_shape(model)),
        *([None] if hasattr(model, 'backbone') else []),
    )
    analyzer = FlopAnalyzer(model, inputs)
    analyzer.set_op_handle('aten::scaled_dot_product_attention', _fused_attention)
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad(), use('reference'):
        counts = analyzer.by_operator()
    return int(sum(counts[name] for name in PRODUCTS))


def _fused_attention(inputs: list, outputs: list) -> Counter:
    """Both products of an attention that is one operator; mmengine knows only single products."""
    query, key = (value.type().sizes() for value in inputs[:2])
    return Counter(matmul=2 * math.prod(query) * key[-2])

"""Parameters and operations of a model, counted by two rules.

``macs`` are the multiply-accumulates of convolutions, linear layers and matrix products only, from
torch's own counter. ``flops_official`` follows the counter of the official code, whose results are
in the paper (Table 6): the same, plus 1 per bias of a linear layer, 4 per value of a batch
normalization, 5 per value of a softmax, and 1 per value of a ReLU, sum, scaling or dropout; GELU,
layer normalization, padding and resizing are free.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable

import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from ..models.attention import LocalWindowSelfAttention
from ..models.block import Bottleneck, HRFormerBlock
from ..models.ffn import DWConvFFN
from ..models.fusion_neck import HRFormerFusion
from ..models.hr_module import HRModule
from ..ops import use, window_count

# torch's counter lacks its attention for CPUs. Two products, 2 FLOPs per MAC.
CPU_ATTENTION = getattr(torch.ops.aten, '_scaled_dot_product_flash_attention_for_cpu', None)
FORMULAS = {CPU_ATTENTION: lambda query, key, *_, **__: 4 * math.prod(query) * key[-2]}


def _attention(module: LocalWindowSelfAttention, x: Tensor, out: Tensor) -> int:
    B, H, W, C = x.shape
    side = module.window_size
    tokens = B * window_count(H, side) * window_count(W, side) * side**2
    weights = tokens * module.num_heads * side**2
    has_bias = module.relative_position_bias_table is not None
    # Scaling the queries; softmax and dropout of the weights, and adding the bias to them.
    return tokens * C + weights * (5 + 1 + has_bias)


def _stock_attention(module: nn.Module, x: Tensor, out: Tensor) -> int:
    """The same for mmpretrain's transformers, (B, N, C), where B includes the windows."""
    weights = x.shape[0] * module.num_heads * x.shape[1] ** 2
    has_bias = hasattr(module, 'relative_position_bias_table')
    return x.numel() + weights * (5 + 1 + has_bias)


def _object_attention(module: nn.Module, pixels: Tensor, regions: Tensor, out: Tensor) -> int:
    """Two softmaxes and two scalings, of one weight per pixel and region of the OCR head."""
    return 2 * (5 + 1) * pixels[:, 0].numel() * regions.shape[2]


def _exchange(module: HRModule, xs: list[Tensor], outs: list[Tensor | None]) -> int:
    return (len(xs) - 1) * sum(out.numel() for out in outs if out is not None)


def _fusion(module: HRFormerFusion, xs: list[Tensor], outs: tuple[Tensor]) -> int:
    widths = [bottleneck[0].conv3.out_channels for bottleneck in module.incre_modules]
    return sum(width * x[:, 0].numel() for width, x in zip(widths[1:], xs[1:]))


def _ffn_dropout(module: DWConvFFN, x: Tensor, out: Tensor) -> int:
    return out.numel() + x[..., 0].numel() * module.feedforward_channels


# Operations of a module itself besides multiply-accumulates, by the rule of the official code.
OFFICIAL_RULE: dict[type, Callable[..., int]] = {
    nn.Linear: lambda module, x, out: out.numel(),  # the bias
    _BatchNorm: lambda module, x, out: 4 * out.numel(),
    nn.ReLU: lambda module, x, out: out.numel(),
    LocalWindowSelfAttention: _attention,
    HRFormerBlock: lambda module, x, out: 2 * out.numel(),  # residual sums
    Bottleneck: lambda module, x, out: out.numel(),
    HRModule: _exchange,
    HRFormerFusion: _fusion,
}


def _rules_for(model: nn.Module) -> dict[type, Callable[..., int]]:
    """The official rule, extended for the modules of frameworks and tasks."""
    rules = dict(OFFICIAL_RULE)
    if any(isinstance(module, HRFormerFusion) for module in model.modules()):
        rules[DWConvFFN] = _ffn_dropout  # only in the classification code
    if ocr_head := sys.modules.get('mmhrformer.models.ocr_head'):  # needs mmseg
        rules[ocr_head.ObjectAttention] = _object_attention
    if stock := sys.modules.get('mmpretrain.models.utils.attention'):
        rules[stock.WindowMSA] = rules[stock.MultiheadAttention] = _stock_attention
    return rules


def input_shape(model: nn.Module, height: int = 224, width: int = 224) -> tuple[int, ...]:
    """Shape of one input image of a model, with the channels of its first convolution.

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
        model (nn.Module): A model built from a config, or a backbone. It is not changed. On the
            device ``'meta'`` only shapes are computed, which is fastest.
        shape (tuple[int, ...], optional): Shape (B, C, H, W) of the input. Defaults to None:
            one image of 224x224.

    Returns:
        dict[str, int]: ``parameters``, ``macs`` and ``flops_official``.

    Examples:
        >>> from mmhrformer import HRFormer
        >>> complexity(HRFormer('tiny'), (1, 3, 64, 64))['macs']
        164407712
    """
    model = revert_sync_batchnorm(copy.deepcopy(model))
    model.train(False)
    others = []  # operations other than multiply-accumulates

    def count_by(rule: Callable[..., int]) -> Callable:
        return lambda module, args, out: others.append(rule(module, *args, out)) if args else None

    for kind, rule in _rules_for(model).items():
        for module in model.modules():
            if isinstance(module, kind):
                module.register_forward_hook(count_by(rule))
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    image = torch.zeros(shape or input_shape(model))
    with torch.no_grad(), use('reference'), counter:
        model(image, *([None] if hasattr(model, 'backbone') else []))
    parameters = sum(p.numel() for p in model.parameters())
    macs = counter.get_total_flops() // 2
    return dict(parameters=parameters, macs=macs, flops_official=macs + sum(others))

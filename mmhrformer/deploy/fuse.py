"""Folding of constant parts of a trained model into its weights, for faster inference."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import ModuleList, Sequential
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .. import ops
from ..models.ablations.plain_ffn import FFN
from ..models.attention import LocalWindowSelfAttention, split_heads
from ..models.block import Bottleneck, HRFormerBlock
from ..models.ffn import DepthwiseConv2d, DWConvFFN
from ..models.hr_module import HRModule
from ..models.hrformer import HRFormer
from ..ops.kernels import have_shapes
from ..ops.recompute import is_plain

# Smallest scale of a layer normalization that can be inverted for the padding.
SMALLEST_SCALE = 1e-3
NORMS = (_BatchNorm, nn.SyncBatchNorm)
CONV_FORWARDS = (nn.Conv2d._conv_forward, DepthwiseConv2d._conv_forward)


def make_linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    """A linear layer of weight (N, K) and bias (N,), with device and data type of another one."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(like.weight)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


class PaddedLayerNorm(nn.LayerNorm):
    """Layer normalization of the first channels; the padding after them stays zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize C channels of tokens (..., C + padding)."""
        (channels,) = self.normalized_shape
        return F.pad(super().forward(x[..., :channels]), (0, x.shape[-1] - channels))


def without_affine(norm: nn.LayerNorm, kind: type = nn.LayerNorm) -> nn.LayerNorm:
    """A layer normalization like another one, without scale and shift."""
    return kind(norm.normalized_shape, norm.eps, elementwise_affine=False)


def is_plain_conv(module: nn.Module) -> bool:
    """Whether a module is an unmodified convolution with numeric zero padding."""
    return (
        is_plain(module, nn.Conv2d)
        and type(module)._conv_forward in CONV_FORWARDS
        and module.padding_mode == 'zeros'
        and not isinstance(module.padding, str)
    )


class InferenceOnly(nn.Module):
    """Base class of folded modules, which cannot be trained."""

    def train(self, mode: bool = True) -> InferenceOnly:
        """Set evaluation mode; training mode raises a RuntimeError."""
        if mode:
            raise RuntimeError(
                'this model was made by fuse_for_inference and cannot be trained: train the model '
                'it was made from'
            )
        return super().train(False)


class FusedWindowAttention(InferenceOnly):
    """:class:`LocalWindowSelfAttention` and the layer normalization before it, for inference.

    The scale and shift of the normalization and the scale of the queries are folded into the
    projection, heads are padded for fast kernels, and the relative position biases are precomputed.
    Padding is zero *after* the normalization, so here it gets the value that the scale and shift
    would map to zero.
    """

    def __init__(self, attn: LocalWindowSelfAttention, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.window_size, self.num_heads = attn.window_size, attn.num_heads
        heads, head_dim = attn.num_heads, attn.embed_dims // attn.num_heads
        missing = ops.backend(attn.qkv.weight).head_padding(head_dim)
        self.head_dim = head_dim + missing
        dtype, table = attn.qkv.weight.dtype, attn.relative_position_bias_table
        scale, shift = norm.weight.double(), norm.bias.double()
        weight = attn.qkv.weight.double().view(3, heads, head_dim, -1)
        plain = attn.qkv.bias.double().view(3, heads, head_dim)
        queries = weight.new_tensor([head_dim**-0.5, 1, 1]).view(3, 1, 1)  # scales queries only
        bias = F.pad((plain + weight @ shift) * queries, (0, missing)).flatten()
        weight = F.pad(weight * scale * queries[..., None], (0, 0, 0, missing)).flatten(0, 2)
        self.qkv = make_linear(weight, bias, attn.qkv)
        weight = attn.proj.weight.view(-1, heads, head_dim)
        self.proj = make_linear(F.pad(weight, (0, missing)).flatten(1), attn.proj.bias, attn.proj)
        self.register_buffer('padding', (-shift / scale).to(dtype))
        bias = None if table is None else attn.relative_position_bias(dtype)
        self.register_buffer('bias', bias)
        self.register_buffer('table', None if table is None else table.detach().clone())
        # Projection of padding: the bias without the shift of the normalization.
        self.register_buffer('pad', F.pad(plain, (0, missing)).flatten().to(dtype))

    @staticmethod
    def fits(attn: nn.Module, norm: nn.Module) -> bool:
        """Whether an attention and a normalization can be folded."""
        return (
            type(attn) is LocalWindowSelfAttention
            and is_plain(attn, LocalWindowSelfAttention)
            and not attn.pad_mask
            and all(is_plain(m, nn.Linear) and m.bias is not None for m in (attn.qkv, attn.proj))
            and is_plain(norm, nn.LayerNorm)
            and norm.bias is not None
            and norm.weight.abs().min() > SMALLEST_SCALE
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map (B, H, W, C), normalized without affine, to one of the same shape."""
        if ops.attends_on_map(x, self.qkv, self.num_heads, self.window_size):
            shape = self.num_heads, self.window_size
            return self.proj(ops.map_attention(self.qkv(x), self.pad, self.table, *shape, 1.0))
        size = x.shape[1:3]
        windows = ops.window_partition(x, self.window_size, self.padding)  # (B * nW, N, C)
        qkv = split_heads(self.qkv(windows), self.num_heads, self.head_dim)
        windows = self.proj(ops.window_attention(qkv, self.bias, scale=1.0))
        return ops.window_merge(windows, self.window_size, size)


class SharedConv(nn.Conv2d):
    """A convolution that shares the parameters of another one."""

    def __init__(self, conv: nn.Conv2d) -> None:
        sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        super().__init__(*sizes, conv.dilation, conv.groups, device='meta')
        self.weight, self.bias = conv.weight, conv.bias


class ConvGELU(SharedConv):
    """A convolution followed by GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, in_channels, H, W) to (B, out_channels, H', W')."""
        return ops.conv_gelu(x, self)


class PointwiseConv(SharedConv):
    """A 1x1 convolution with a bias, for inference."""

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        """Whether a convolution can be replaced."""
        return (
            type(conv) is nn.Conv2d
            and is_plain_conv(conv)
            and conv.kernel_size == conv.stride == (1, 1)
            and conv.padding == (0, 0)
            and conv.groups == 1
            and conv.bias is not None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, in_channels, H, W) to (B, out_channels, H, W)."""
        return ops.pointwise_conv(x, self.weight, self.bias)


class FusedDWConvFFN(InferenceOnly):
    """:class:`DWConvFFN` with folded normalizations, for inference."""

    def __init__(self, ffn: DWConvFFN) -> None:
        super().__init__()
        self.fc1, self.dw3x3, self.fc2 = map(ConvGELU, (ffn.fc1, ffn.dw3x3, ffn.fc2))

    @staticmethod
    def fits(ffn: nn.Module) -> bool:
        """Whether an FFN can be replaced: all its normalizations are folded."""
        return (
            type(ffn) is DWConvFFN
            and is_plain(ffn, DWConvFFN)
            and all(type(norm) is nn.Identity for norm in (ffn.norm1, ffn.norm2, ffn.norm3))
            and all(is_plain_conv(conv) for conv in (ffn.fc1, ffn.dw3x3, ffn.fc2))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map of shape (B, H, W, C) to one of the same shape."""
        x = x.permute(0, 3, 1, 2)  # (B, C, H, W), channels-last in memory: nothing is copied
        return self.fc2(self.dw3x3(self.fc1(x))).permute(0, 2, 3, 1)


class FusedBlock(InferenceOnly):
    """:class:`HRFormerBlock` with folded attention and folded FFN, for inference.

    The scale and shift of the second normalization are folded into the convolution after it.
    """

    def __init__(self, block: HRFormerBlock) -> None:
        super().__init__()
        self.norm1, self.attn, self.ffn = block.norm1, block.attn, block.ffn
        norm, conv = block.norm2, self.ffn.fc1
        self.norm2 = without_affine(norm)
        weight = conv.weight.double()  # (hidden channels, C, 1, 1)
        bias = conv.bias.double() + weight.flatten(1) @ norm.bias.double()
        weight = weight * norm.weight.double().view(1, -1, 1, 1)
        conv.weight = nn.Parameter(weight.to(conv.weight))
        conv.bias = nn.Parameter(bias.to(conv.bias))

    @staticmethod
    def fits(block: HRFormerBlock) -> bool:
        """Whether a block can be replaced: it is unmodified and its parts are folded."""
        return (
            is_plain(block, HRFormerBlock)
            and type(block.attn) is FusedWindowAttention
            and type(block.ffn) is FusedDWConvFFN
            and have_shapes(block.ffn.fc1, block.ffn.dw3x3, block.ffn.fc2)
            and block.ffn.fc1.bias is not None
            and is_plain(block.norm2, nn.LayerNorm)
            and block.norm2.bias is not None
        )

    def is_intact(self) -> bool:
        """Whether the parts are still those that were folded: not replaced, hooked or compiled."""
        attn, ffn = self.attn, self.ffn
        if not (is_plain(attn, FusedWindowAttention) and is_plain(ffn, FusedDWConvFFN)):
            return False
        qkv, proj, convs = attn.qkv, attn.proj, (ffn.fc1, ffn.dw3x3, ffn.fc2)
        are_plain = (
            is_plain(qkv, nn.Linear)
            and is_plain(proj, nn.Linear)
            and all(is_plain(conv, ConvGELU) for conv in convs)
            and is_plain(self.norm1, nn.LayerNorm, PaddedLayerNorm)
            and is_plain(self.norm2, nn.LayerNorm, PaddedLayerNorm)
        )
        inner = attn.num_heads * attn.head_dim
        return (
            are_plain
            and have_shapes(*convs)
            and (qkv.out_features, proj.in_features) == (3 * inner, inner)
            and qkv.in_features == proj.out_features == ffn.fc1.in_channels == ffn.fc2.out_channels
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map of shape (B, H, W, C) to one of the same shape."""
        if ops.has_folded_block(x, self):
            return ops.folded_block(x, self)
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


# The kinds of blocks in a model, folded or not.
BLOCKS = (HRFormerBlock, FusedBlock)


def replace(model: nn.Module, kind: type, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace all sub-modules of a kind, or the model itself."""
    if isinstance(model, kind):
        return make(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))
    return model


def fold_block(block: HRFormerBlock) -> nn.Module:
    """Fold what can be folded in a block whose batch normalizations are folded already."""
    if FusedWindowAttention.fits(block.attn, block.norm1):
        block.attn = FusedWindowAttention(block.attn, block.norm1)
        block.norm1 = without_affine(block.norm1)
    if FusedDWConvFFN.fits(block.ffn):
        block.ffn = FusedDWConvFFN(block.ffn)
    return FusedBlock(block) if FusedBlock.fits(block) else block


def count_uses(model: nn.Module) -> Counter:
    """How often each module occurs in a model, by id."""
    return Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))


# Modules that call a convolution and the normalization listed after it one after the other.
CALL_IN_ORDER = (nn.Sequential, HRFormer, Bottleneck, DWConvFFN, FFN, ConvModule)


def calls_in_order(module: nn.Module) -> bool:
    """Whether a module is known to call its layers in the order in which it lists them."""
    if isinstance(module, ConvModule) and 'conv norm' not in ' '.join(module.order):
        return False  # it lists the convolution first even if it calls the normalization first
    forward = type(module).forward
    known = any(isinstance(module, kind) and forward is kind.forward for kind in CALL_IN_ORDER)
    return known and 'forward' not in vars(module)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold batch normalization into the convolution directly before it.

    Layers that are not stock convolutions or normalizations, are used in several places or have
    hooks are not changed, nor are those of modules that may call them in another order.

    Args:
        model (nn.Module): A model in evaluation mode. It is changed in place.

    Returns:
        nn.Module: The model.
    """
    uses = count_uses(model)
    for parent in filter(calls_in_order, list(model.modules())):
        before = None
        for name, child in list(parent.named_children()):
            follows = before is not None and is_plain(child, *NORMS) and child.track_running_stats
            if follows and uses[id(before)] == uses[id(child)] == 1:
                statistics = (child.running_mean, child.running_var, child.eps)
                before.weight, before.bias = fuse_conv_bn_weights(
                    before.weight, before.bias, *statistics, child.weight, child.bias
                )
                setattr(parent, name, nn.Identity())
            before = child if is_plain_conv(child) else None
    return model


class CroppedStreams(InferenceOnly):
    """Last layer of a padded backbone, which removes the padding of the streams."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)

    def forward(self, xs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Crop streams (B, C_i + padding, H_i, W_i) to (B, C_i, H_i, W_i), dense in memory."""
        return [
            None if x is None else x[:, :c].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            for x, c in zip(xs, self.channels)
        ]


# Modules of a backbone, besides its blocks, whose channels can be padded.
PADDABLE = (ModuleList, Sequential, HRModule, nn.Identity, nn.ReLU)
PADDABLE += (nn.Conv2d, DepthwiseConv2d, PointwiseConv)


def is_paddable(module: nn.Module) -> bool:
    """Whether a part of a backbone can be padded with zero channels without changing results."""
    if type(module) is FusedBlock:
        return is_plain(module, FusedBlock) and module.is_intact()
    known = type(module) in PADDABLE and is_plain(module, type(module))
    return known and all(map(is_paddable, module.children()))


def append_zeros(layer: nn.Linear | nn.Conv2d, inputs: int, outputs: int) -> None:
    """Extend a layer by inputs that it ignores and by outputs that are zero."""
    kind = 'features' if isinstance(layer, nn.Linear) else 'channels'
    setattr(layer, f'in_{kind}', getattr(layer, f'in_{kind}') + inputs)
    setattr(layer, f'out_{kind}', getattr(layer, f'out_{kind}') + outputs)
    if getattr(layer, 'groups', 1) > 1:  # depth-wise
        layer.groups, inputs = layer.groups + outputs, 0
    taps = (0, 0) * (layer.weight.dim() - 2)
    layer.weight = nn.Parameter(F.pad(layer.weight, (*taps, 0, inputs, 0, outputs)))
    if layer.bias is not None:
        layer.bias = nn.Parameter(F.pad(layer.bias, (0, outputs)))


def pad_block(block: FusedBlock, padding: Callable[[int], int]) -> None:
    """Extend the attention and the normalizations of a block for padded maps."""
    attn, missing = block.attn, padding(*block.norm1.normalized_shape)
    if missing:
        append_zeros(attn.qkv, missing, 0)
        append_zeros(attn.proj, 0, missing)
        attn.padding = F.pad(attn.padding, (0, missing))
        block.norm1 = without_affine(block.norm1, PaddedLayerNorm)
        block.norm2 = without_affine(block.norm2, PaddedLayerNorm)


def pad_layers(modules: Iterable[nn.Module], padding: Callable[[int], int]) -> None:
    """Extend the layers of folded parts for padded maps; ``padding`` gives the zero channels."""
    for module in modules:
        if isinstance(module, nn.Conv2d):
            append_zeros(module, padding(module.in_channels), padding(module.out_channels))
        elif type(module) is FusedBlock:
            pad_block(module, padding)


def pad_streams(backbone: HRFormer, uses: Counter) -> None:
    """Append zero channels to the maps of a folded backbone for fast kernels.

    Their filters and biases are zero, normalizations exclude them, and they are removed at the end.
    Nothing is changed if any part was modified.
    """
    padding = ops.backend(next(backbone.parameters())).channel_padding
    # Starting with the first transition: before it, all maps have 64 or 256 channels.
    names = ('transition1', 'stage2', 'transition2', 'stage3', 'transition3', 'stage4')
    parts = [getattr(backbone, name) for name in names]
    modules = [module for part in parts for module in part.modules()]
    convs = [module for module in modules if isinstance(module, nn.Conv2d)]
    if not (
        any(map(padding, backbone.arch['channels']))
        and is_plain(backbone, HRFormer)
        and all(map(is_paddable, parts))
        and all(uses[id(module)] == 1 for module in modules)
        and all(c.groups == 1 or c.groups == c.in_channels == c.out_channels for c in convs)
    ):
        return
    pad_layers(modules, padding)
    backbone.stage4.append(CroppedStreams(backbone.arch['channels']))


def fuse_for_inference(model: nn.Module, pad_channels: bool = True) -> nn.Module:
    """Fold constant parts of a trained model, for faster inference with the same results.

    Batch normalization is folded into the convolutions, layer normalization and the scale of the
    queries into the projections of the attention, and the relative position biases are precomputed.

    Args:
        model (nn.Module): A classifier, pose estimator or segmentor with an HRFormer backbone, or
            a bare :class:`HRFormer`. It is not changed.
        pad_channels (bool): Whether to append zero channels to the maps of the backbone if its
            weights are on a GPU with Triton's kernels: in HRFormer-B, 78 become 80 and 156 become
            160. Outputs do not change, and it takes 0.81 times as long (64 images on an H200).
            Defaults to True.

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
        fold_batch_norm(fused)
        fused = replace(fused, HRFormerBlock, fold_block)
        replace(fused, nn.Conv2d, lambda c: PointwiseConv(c) if PointwiseConv.fits(c) else c)
        backbones = [m for m in fused.modules() if isinstance(m, HRFormer)]
        for backbone in backbones if pad_channels else ():
            pad_streams(backbone, count_uses(fused))
    fused.requires_grad_(False)
    fused.train(False)  # mmpose's eval() returns nothing
    return fused

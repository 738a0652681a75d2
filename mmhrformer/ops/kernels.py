"""Backend for GPUs with Triton: kernels where they apply, :mod:`.cuda` otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache, partial
from operator import attrgetter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from . import cuda, reference, triton_support
from .cuda import head_padding
from .recompute import is_plain, is_recomputed
from .state import autocast_dtype, in_same_backend, needs_grad
from .triton_support import DTYPES, channels_last, direct

MAX_HEAD_DIM = 64
MAX_WINDOW = 15
# Data types for which the linear kernel was measured. It was not in float32, where it computes
# three TF32 products; cuBLAS is used there.
LINEAR_DTYPES = (torch.float16, torch.bfloat16)
geometry = attrgetter('kernel_size', 'stride', 'padding', 'dilation', 'padding_mode')
# The geometry of convolutions whose output is as large as their input, by kernel size.
SAME_SIZE = {n: ((n, n), (1, 1), (n // 2, n // 2), (1, 1), 'zeros') for n in (1, 3)}


@cache
def why_not(device: torch.device) -> str:
    """Reason why the kernels cannot run on a device, empty if a trial run succeeds."""
    return triton_support.why_not(device) or try_kernel(device)


def try_kernel(device: torch.device) -> str:
    """Compile and run a small kernel, which takes a C compiler; return why it failed, or ''.

    The direct launch, without Triton's own, is tried as well, and disabled if its result differs.
    """
    from . import triton_launch
    from .triton_layer_norm import layer_norm

    with _disable_current_modes():  # a FakeTensorMode would compute nothing
        x = torch.linspace(0, 1, 32, dtype=torch.float32, device=device).view(1, 32)
        try:
            expected = layer_norm(x, None, None, 1e-6)
        except torch.cuda.OutOfMemoryError:  # would disable the kernels for the rest of the process
            raise
        except Exception as err:
            reason = f'Triton fails on {device}, {type(err).__name__}: {err}'
            print_log(f'The kernels are not used: {reason}', 'current', logging.WARNING)
            return reason
        try:
            is_equal = torch.equal(layer_norm(x, None, None, 1e-6), expected)
        except Exception:
            is_equal = False
    if not is_equal:
        triton_launch.use_own_launch_only()
    return ''


def channel_padding(channels: int) -> int:
    """Number of zero channels that align the rows of a folded backbone's streams to 16 bytes.

    None if they would add more than an eighth, as with 18 channels.
    """
    missing = -channels % 8
    return missing if missing * 8 <= channels else 0


def attends_on_map(x: Tensor, qkv: nn.Module, heads: int, window: int) -> bool:
    """See :func:`mmhrformer.ops.attends_on_map`."""
    return (
        x.dtype in DTYPES
        and window <= MAX_WINDOW
        and is_plain(qkv, nn.Linear)
        and qkv.bias is not None
        and qkv.out_features <= 3 * heads * MAX_HEAD_DIM
    )


def attend_on_map(
    x: Tensor,
    qkv: nn.Module,
    proj: nn.Module,
    table: Tensor | None,
    heads: int,
    window: int,
    pad_mask: bool = False,
) -> Tensor:
    """Project a map to queries, keys and values, attend within its windows, project the result.

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        qkv (nn.Module): The projection to (B, H, W, 3 * heads * head_dim).
        proj (nn.Module): The projection of the output of the attention.
        table (Tensor, optional): Relative position biases, ((2 * window - 1)**2, heads).
        heads (int): Attention heads.
        window (int): Side of the windows, in tokens.
        pad_mask (bool): Whether padded tokens are hidden. Defaults to False.

    Returns:
        Tensor: Map of shape (B, H, W, C).
    """
    # Pad heads of 39 channels to 40, in the weights: otherwise a thread loads 2 bytes at a time
    # instead of 16.
    head_dim = qkv.out_features // 3 // heads
    missing = head_padding(head_dim)
    scale = head_dim**-0.5
    # The gradient of the bias comes with that of the attention.
    if not missing or not is_plain(proj, nn.Linear):
        x = F.linear(x, qkv.weight, qkv.bias.detach())
        return proj(map_attention(x, qkv.bias, table, heads, window, scale, pad_mask))
    weight = qkv.weight.unflatten(0, (3 * heads, head_dim))
    weight = F.pad(weight, (0, 0, 0, missing)).flatten(0, 1)
    bias = F.pad(qkv.bias.unflatten(0, (3 * heads, head_dim)), (0, missing)).flatten()
    x = F.linear(x, weight, bias.detach())  # (B, H, W, 3 * heads * (head_dim + missing))
    x = map_attention(x, bias, table, heads, window, scale, pad_mask)
    weight = F.pad(proj.weight.unflatten(1, (heads, head_dim)), (0, missing)).flatten(1)
    return F.linear(x, weight, proj.bias)


def map_attention(
    qkv: Tensor,
    pad: Tensor,
    table: Tensor | None,
    heads: int,
    window: int,
    scale: float,
    pad_mask: bool = False,
) -> Tensor:
    """Window attention that reads the windows directly from the map, without copies.

    Args:
        qkv (Tensor): Queries, keys and values of shape (B, H, W, 3 * heads * head_dim).
        pad (Tensor): Query, key and value of a padded token, of shape (3 * heads * head_dim,):
            the bias of the projection. Its gradient is that of the bias in all tokens, so project
            ``qkv`` with ``pad.detach()``.
        table (Tensor, optional): Relative position biases, ((2 * window - 1)**2, heads).
        heads (int): Attention heads.
        window (int): Side of the windows, in tokens.
        scale (float): Factor of the logits, before the bias.
        pad_mask (bool): Whether padded tokens are hidden. Defaults to False.

    Returns:
        Tensor: Map of shape (B, H, W, heads * head_dim).
    """
    from .triton_attention import window_attention as kernel

    return kernel(qkv, pad, table, heads, window, scale, pad_mask)


def conv_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """See :func:`mmhrformer.ops.conv_gelu`."""
    from .triton_conv import depthwise_gelu
    from .triton_linear import linear_gelu

    dtype = autocast_dtype(x.device.type) or x.dtype
    x, weight = x.to(dtype), conv.weight.to(dtype)
    bias = conv.bias
    same = conv.stride == (1, 1) and conv.dilation == (1, 1)
    if dtype not in DTYPES or not same or needs_grad(x, weight, bias):
        return reference.conv_gelu(x, conv)
    is_linear = conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding == (0, 0)
    if is_linear and dtype in LINEAR_DTYPES:
        rows = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        return linear_gelu(rows, weight.flatten(1), bias).permute(0, 3, 1, 2)
    if conv.kernel_size == (3, 3) and conv.groups == x.shape[1] and conv.padding == (1, 1):
        return depthwise_gelu(x, weight, bias)
    return reference.conv_gelu(x, conv)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """See :func:`mmhrformer.ops.depthwise_conv`."""
    from .triton_conv import depthwise_conv as kernel

    x = x.to(autocast_dtype(x.device.type) or x.dtype)
    if x.dtype not in DTYPES or stride > 2:
        return reference.depthwise_conv(x, weight, bias, stride)
    is_last = x.is_contiguous(memory_format=torch.channels_last) or not x.is_contiguous()
    out = kernel(x, weight, bias, stride)
    return out if is_last else out.contiguous()


def exchange_sum(
    x: Tensor, others: Iterable[tuple[Tensor, int]], mode: str, relu: nn.Module
) -> Tensor:
    """See :func:`mmhrformer.ops.exchange_sum`.

    One pass over the map instead of two for each of the others, and one for the activation.
    """
    from .triton_exchange import MAX_FACTOR, MAX_IMAGES, MAX_MAPS
    from .triton_exchange import exchange_sum as kernel

    pairs = list(others)
    maps, factors = [other for other, _ in pairs], [factor for _, factor in pairs]
    fits = (
        1 <= len(pairs) <= MAX_MAPS
        and max(factors) <= MAX_FACTOR
        and 0 < len(x) <= MAX_IMAGES
        and all(tensor.dtype in DTYPES for tensor in (x, *maps))
        and not needs_grad(x, *maps)
    )
    if not fits:
        return cuda.exchange_sum(x, pairs, mode, relu)
    has_relu = is_plain(relu, nn.ReLU)
    out = kernel(x, maps, factors, mode == 'bilinear', has_relu)
    return out if has_relu else relu(out)


def has_folded_block(x: Tensor, block: nn.Module) -> bool:
    """See :func:`mmhrformer.ops.has_folded_block`."""
    from .triton_layer_norm import MAX_CHANNELS

    if x.dtype not in LINEAR_DTYPES or not block.is_intact():
        return False
    attn = block.attn
    weight = attn.qkv.weight
    return (
        x.dtype == weight.dtype
        and autocast_dtype(x.device.type) is None
        and not needs_grad(x, weight)
        and x.shape[-1] == attn.qkv.in_features <= MAX_CHANNELS
        and attn.window_size <= MAX_WINDOW
        and attn.head_dim <= MAX_HEAD_DIM
    )


def folded_block(x: Tensor, block: nn.Module) -> Tensor:
    """Compute a folded block from the weights of its parts, in six kernels, or eight if it is wide.

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        block (nn.Module): A :class:`mmhrformer.deploy.fuse.FusedBlock`.

    Returns:
        Tensor: Map of the same shape.
    """
    from .triton_attention import attention_forward
    from .triton_conv import depthwise_forward
    from .triton_layer_norm import forward as norm_forward
    from .triton_linear import NORM_TILES, linear_forward

    # Look up modules and the recording state once each: that takes as long as launching.
    attend, linear, depthwise, norm = direct(
        x, attention_forward, linear_forward, depthwise_forward, norm_forward
    )
    attn, ffn = block.attn, block.ffn
    qkv, proj, fc1, dw3x3, fc2 = attn.qkv, attn.proj, ffn.fc1, ffn.dw3x3, ffn.fc2
    (channels,) = block.norm1.normalized_shape  # padded maps have more
    width = x.shape[-1]

    def norm_linear(x: Tensor, layer: nn.Module, gelu: bool, eps: float) -> Tensor:
        if width <= max(NORM_TILES):
            return linear(x, layer.weight, layer.bias, gelu, None, eps, channels)
        y = norm(x[..., :channels].contiguous(), None, None, eps, x.dtype)
        y = F.pad(y, (0, width - channels)) if width > channels else y
        return linear(y, layer.weight, layer.bias, gelu, None, None)

    y = norm_linear(x, qkv, False, block.norm1.eps)  # (B, H, W, 3 * heads * head_dim)
    y = attend(y, attn.pad, attn.table, attn.num_heads, attn.window_size, 1.0, False)
    x = linear(y, proj.weight, proj.bias, False, x, None)  # (B, H, W, C)
    y = norm_linear(x, fc1, True, block.norm2.eps)  # (..., 4 C)
    y = depthwise(y.permute(0, 3, 1, 2), dw3x3.weight, dw3x3.bias, 1, True)
    return linear(y.permute(0, 2, 3, 1), fc2.weight, fc2.bias, True, x, None)


def fork_layer_norm(x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """See :func:`mmhrformer.ops.fork_layer_norm`."""
    from .triton_layer_norm import MAX_CHANNELS
    from .triton_layer_norm import fork_layer_norm as kernel

    fits = is_plain(norm, nn.LayerNorm) and norm.normalized_shape == x.shape[-1:]
    dtype = autocast_dtype(x.device.type) or x.dtype
    if not fits or x.dtype not in DTYPES or x.shape[-1] > MAX_CHANNELS:
        return norm(x), x
    # Under autocast torch's result would be float32, which the next layer would cast to the data
    # type that this result already has.
    return kernel(x, norm.weight, norm.bias, norm.eps, dtype)


def has_conv_ffn(x: Tensor, ffn: nn.Module) -> bool:
    """See :func:`mmhrformer.ops.has_conv_ffn`."""
    dtype = autocast_dtype(x.device.type) or x.dtype
    return (
        dtype in LINEAR_DTYPES
        and len(x) > 0
        and needs_grad(x, *ffn.parameters())
        and ffn.is_intact()
        and x.shape[-1] == ffn.fc1.in_channels
        and fits_norm(ffn.norm1, ffn.fc1.out_channels)
        and fits_norm(ffn.norm2, ffn.dw3x3.out_channels)
        and fits_norm(ffn.norm3, ffn.fc2.out_channels)
    )


def conv_ffn(x: Tensor, ffn: nn.Module) -> Tensor:
    """The FFN in training: of its parts, none but the normalizations are computed again.

    A bias in front of a normalization by the statistics of the map has no effect, and a gradient
    of exactly zero, which is not computed. With this and with other gradients of biases, a training
    step of HRFormer-S has 2,508 launches instead of 3,696, moves 1,152 MB per image instead of
    1,335, and takes 32 ms on an H200 instead of 41 (32 images, CUDA graph).

    Args:
        x (Tensor): Map of shape (B, H, W, C).
        ffn (nn.Module): A :class:`mmhrformer.models.ffn.DWConvFFN`.

    Returns:
        Tensor: Map of the same shape.
    """
    from .triton_ffn import ConvFFN, to_map, to_rows

    dtype = autocast_dtype(x.device.type) or x.dtype
    norms = ffn.norm1, ffn.norm2, ffn.norm3
    parameters = []
    for conv, norm in zip((ffn.fc1, ffn.dw3x3, ffn.fc2), norms):
        weight, bias = conv.weight, conv.bias
        if conv is not ffn.dw3x3:  # whose kernel takes any data type
            weight, bias = weight.to(dtype), bias.to(dtype)
        parameters += [weight, bias, norm.weight, norm.bias]
    measure = [partial(measure_map, norm=norm) for norm in norms]
    return to_rows(ConvFFN.apply(measure, to_map(x.to(dtype).contiguous()), *parameters))


def have_shapes(fc1: nn.Conv2d, dw3x3: nn.Conv2d, fc2: nn.Conv2d) -> bool:
    """Whether convolutions are 1x1, 3x3 depth-wise and 1x1, as the kernels assume.

    Attributes of layers are compared, since their weights take much longer to look up.
    """
    return (
        fc1.out_channels == dw3x3.in_channels == dw3x3.out_channels == fc2.in_channels
        and dw3x3.groups == fc1.out_channels
        and fc1.groups == fc2.groups == 1
        and geometry(fc1) == geometry(fc2) == SAME_SIZE[1]
        and geometry(dw3x3) == SAME_SIZE[3]
    )


def fits_norm(norm: nn.Module, channels: int) -> bool:
    """Whether the kernels know a normalization of maps with this number of channels."""
    is_known = is_plain(norm, _BatchNorm, nn.SyncBatchNorm) and norm.affine
    return is_known and norm.num_features == channels


def norm_gelu_conv(x: Tensor, norm: nn.Module, conv: nn.Module | None = None) -> Tensor:
    """See :func:`mmhrformer.ops.norm_gelu_conv`.

    As in :mod:`.recompute`, but normalization and GELU are one kernel that keeps only its input,
    and the statistics are not recomputed.
    """
    fits = fits_norm(norm, x.shape[1]) and x.dtype in DTYPES
    # A process without images still takes part in the communication of the others' kernels.
    if not fits or not (len(x) or sync_group(norm)):
        return cuda.norm_gelu_conv(x, norm, conv)
    normalize = prepare_norm_gelu(x, norm)
    x = channels_last(x)
    if conv is None:
        return normalize(x)
    plain = is_plain(conv, nn.Conv2d) and not is_recomputed()
    if plain and needs_grad(x, conv.weight):
        again = in_same_backend(lambda x: conv(normalize(x)))
        return checkpoint(again, x, use_reentrant=False, preserve_rng_state=False)
    return conv(normalize(x))


def prepare_norm_gelu(x: Tensor, norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """Measure a map (B, C, H, W); return a function that normalizes it and applies GELU."""
    from .triton_norm import normalize_gelu

    statistics, group, eps, training = measure_map(x, norm)
    return partial(normalize_gelu, weight=norm.weight, bias=norm.bias, statistics=statistics,
                   eps=eps, training=training, process_group=group)  # fmt: skip


def measure_map(x: Tensor, norm: _BatchNorm) -> tuple:
    """Measure a map (B, C, H, W) for a normalization, and update its running statistics.

    Returns:
        tuple: The statistics, three of shape (C,), see :func:`~.triton_norm.normalize_gelu`; the
        process group that shares them, if any; eps; and whether they were computed from the map.
    """
    from .triton_norm import batch_statistics

    if not (norm.training or norm.running_mean is None):
        return (norm.running_mean, norm.running_mean, norm.running_var), None, norm.eps, False
    group, momentum, tracked = sync_group(norm), norm.momentum, norm.num_batches_tracked
    running = norm.running_mean, norm.running_var
    if not (norm.training and norm.track_running_stats):
        running, tracked = (None, None), None
    elif tracked is not None and momentum is None:
        tracked.add_(1)
        momentum, tracked = 1.0 / float(tracked), None
    x = channels_last(x.detach())
    with torch.no_grad():
        statistics = batch_statistics(x, *running, momentum or 0.0, group, tracked)
    return statistics, group, norm.eps, True


def add_path(x: Tensor, path: Tensor, drop: nn.Module) -> Tensor:
    """See :func:`mmhrformer.ops.add_path`.

    One pass over the map instead of three, and one instead of two in the backward pass.
    """
    drops = is_plain(drop, DropPath) and drop.training and drop.drop_prob > 0
    if not drops or x.dtype != path.dtype:
        return x + drop(path)
    keep = 1 - drop.drop_prob
    shape = (len(path),) + (1,) * (path.dim() - 1)
    kept = (keep + torch.rand(shape, dtype=path.dtype, device=path.device)).floor_()
    return torch.addcmul(x, path, kept, value=1 / keep)


def sync_group(norm: _BatchNorm) -> dist.ProcessGroup | None:
    """The process group in which a normalization shares its statistics, None if alone."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None

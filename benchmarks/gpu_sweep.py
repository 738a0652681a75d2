"""Launch options of the Triton kernels, timed against one another in the shapes of the models."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import benchmark_measure as bm
import torch
import torch.nn.functional as F
from torch import Tensor

from mmhrformer.ops import triton_support

CALLS = 10  # in one CUDA graph, so that the launches are not what is timed
DTYPE = torch.bfloat16
BATCH = 64
# Height, width, heads, numbers of a head: the streams of HRFormer-S, and of -B, padded or not.
STREAMS = dict(S0=(64, 48, 1, 32), S1=(32, 24, 2, 32), B0=(64, 48, 2, 40))
# Height, width and channels inside FFNs.
HIDDEN = dict(S0=(64, 48, 128), S2=(16, 12, 512), B0=(64, 48, 312))
# Inputs, outputs and rows of an image of the linear layers of FFNs.
LINEAR = [
    (32, 128, 3072), (128, 32, 3072), (32, 96, 3072), (64, 256, 768), (256, 64, 768),
    (512, 128, 192), (78, 312, 3072), (312, 78, 3072), (624, 156, 768),
]  # fmt: skip
DEPTHWISE_TILES = [
    (16, 8, 64, 4), (8, 8, 64, 4), (32, 8, 64, 4), (16, 16, 64, 4), (16, 16, 64, 8), (16, 4, 64, 2),
    (16, 4, 128, 4), (16, 16, 32, 4), (16, 8, 64, 4, False, 1), (16, 8, 64, 4, False, 3),
    (32, 4, 64, 2), (16, 8, 128, 8), (64, 8, 64, 4), (32, 8, 64, 4, False, 3),
]  # fmt: skip
LINEAR_TILES = [
    (128, 128, 64, 1, 4, 3), (128, 128, 64, 1, 8, 3), (128, 64, 64, 1, 4, 3),
    (128, 32, 64, 1, 4, 3), (64, 128, 64, 1, 4, 3), (64, 64, 64, 1, 4, 3), (256, 64, 64, 1, 8, 3),
    (64, 32, 64, 1, 4, 2), (64, 256, 64, 1, 8, 3), (128, 64, 32, 1, 4, 4), (128, 128, 64, 8, 8, 4),
]  # fmt: skip
NORM_LAUNCHES = [
    (4096, 1024, 4), (4096, 2048, 4), (4096, 4096, 4), (2048, 4096, 4), (8192, 1024, 8),
    (8192, 4096, 8),
]  # fmt: skip
LAYER_NORM_LAUNCHES = [
    (4096, 1 << 30, 4), (2048, 1 << 30, 4), (8192, 1 << 30, 4), (2048, 1024, 4), (2048, 2048, 4),
    (4096, 1024, 4), (4096, 2048, 8),
]  # fmt: skip
# Maps read or written, by kernel of batch normalization.
NORM_PASSES = dict(moments=1, normalize=2, gradient_sums=2, input_gradient=3)


class Sweep(NamedTuple):
    """A kernel in a shape, and the ways to launch it.

    Attributes:
        kernel (str): Name of the kernel.
        shape (str): Name of the shape.
        moved (int): Bytes that must be read and written.
        options (list): The ways to launch it, and names of what else computes the same.
        apply (Callable): Takes one of the ways, and sets it.
        make (Callable): Makes the inputs, and returns the function that runs the kernel.
        others (dict): Makers of functions of torch for the same inputs, by name.
    """

    kernel: str
    shape: str
    moved: int
    options: list
    apply: Callable
    make: Callable[[], Callable]
    others: dict[str, Callable[[], Callable]] = {}


def random(*size: int, device: str, dtype: torch.dtype = DTYPE) -> Tensor:
    """Random numbers; maps (B, C, H, W) are channels-last in memory."""
    x = torch.randn(*size, device=device).to(dtype)
    is_map = len(size) == 4 and size[-1] < size[1]
    return x.contiguous(memory_format=torch.channels_last) if is_map else x


def attention_sweeps(batch: int, streams: dict, device: str) -> Iterator[Sweep]:
    """Window attention and its gradients."""
    from mmhrformer.ops import triton_attention as attention

    grids = dict(
        forward=itertools.product((528, 1056, 2112), (2, 4), (1, 2)),
        queries=itertools.product((264, 528), (4, 8), (1, 2)),
    )
    for (kind, grid), (name, (H, W, heads, dim)) in itertools.product(
        [(kind, list(grid)) for kind, grid in grids.items()], streams.items()
    ):

        def apply(option: tuple, kind: str = kind) -> None:
            keys = 'programs', 'num_warps', 'num_stages'
            attention.OPTIONS[kind] = dict(zip(keys, option))

        def make(kind: str = kind, H: int = H, W: int = W, heads: int = heads, dim: int = dim):
            qkv, pad = (random(*s, 3 * heads * dim, device=device) for s in ((batch, H, W), ()))
            table, scale = torch.randn(169, heads, device=device), dim**-0.5
            if kind == 'forward':
                return lambda: attention.window_attention(qkv, pad, table, heads, 7, scale)
            grad = random(batch, H, W, heads * dim, device=device)
            backward = attention._window_attention_backward
            return lambda: backward(grad, qkv, pad, table, heads, 7, scale, False)

        moved = (8 if kind == 'forward' else 14) * batch * H * W * heads * dim
        yield Sweep(f'attention {kind}', name, moved, grid, apply, make)


def depthwise_sweeps(batch: int, hidden: dict, device: str) -> Iterator[Sweep]:
    """Depth-wise convolution with GELU."""
    from mmhrformer.ops import triton_conv as conv

    def apply(option: tuple) -> None:
        conv.DEPTHWISE_TILES.clear()
        conv.DEPTHWISE_TILES[1 << 31] = conv.DepthwiseTile(*option)

    for name, (H, W, C) in hidden.items():

        def make(form: str = '', H: int = H, W: int = W, C: int = C) -> Callable:
            x = random(batch, C, H, W, device=device)
            weight, bias = random(C, 1, 3, 3, device=device), random(C, device=device)
            if form:
                return lambda: F.gelu(F.conv2d(x, weight, bias, padding=1, groups=C))
            return lambda: conv.depthwise_gelu(x, weight, bias)

        others = dict(torch=lambda make=make: make('torch'))
        moved = 4 * batch * H * W * C
        yield Sweep('depthwise', name, moved, DEPTHWISE_TILES, apply, make, others)


def linear_sweeps(batch: int, shapes: list, device: str) -> Iterator[Sweep]:
    """Linear layer with GELU."""
    from mmhrformer.ops import triton_conv as conv

    def apply(option: tuple) -> None:
        for key in conv.LINEAR_TILES:
            conv.LINEAR_TILES[key] = conv.LinearTile(*option)

    for K, N, rows in shapes:

        def make(form: str = '', K: int = K, N: int = N, rows: int = rows) -> Callable:
            x, weight = random(batch * rows, K, device=device), random(N, K, device=device)
            bias = random(N, device=device)
            if form:
                return lambda: F.gelu(F.linear(x, weight, bias))
            return lambda: conv.linear_gelu(x, weight, bias)

        others = dict(torch=lambda make=make: make('torch'))
        tiles = [tile for tile in LINEAR_TILES if tile[1] <= 2 * N and tile[2] <= 2 * K]
        moved = 2 * batch * rows * (K + N)
        yield Sweep('linear', f'{K} to {N}', moved, tiles or LINEAR_TILES, apply, make, others)


def norm_sweeps(batch: int, hidden: dict, device: str) -> Iterator[Sweep]:
    """The four kernels of batch normalization with GELU."""
    from mmhrformer.ops import triton_norm as norm

    for (stage, passes), (name, (H, W, C)) in itertools.product(
        NORM_PASSES.items(), hidden.items()
    ):

        def apply(option: tuple, stage: str = stage) -> None:
            norm.LAUNCH[stage] = option

        def make(stage: str = stage, H: int = H, W: int = W, C: int = C) -> Callable:
            x, grad = (random(batch, C, H, W, device=device) for _ in range(2))
            weight, bias, mean, var = (torch.rand(C, device=device) for _ in range(4))
            if stage == 'moments':
                return lambda: norm.moments(x, mean, var, 0.1)
            args = (*norm.moments(x, mean, var, 0.1).unbind(), weight, bias)
            if stage == 'input_gradient':
                args += (torch.randn(2, C, device=device),)
            inputs = (x,) if stage == 'normalize' else (grad, x)
            return lambda: getattr(norm, stage)(*inputs, *args, 1e-5, True, True)

        moved = 2 * passes * batch * H * W * C
        yield Sweep(f'norm {stage}', name, moved, NORM_LAUNCHES, apply, make)


def layer_norm_sweeps(batch: int, streams: dict, device: str) -> Iterator[Sweep]:
    """Layer normalization and its gradients."""
    from mmhrformer.ops import triton_layer_norm as norm

    for (stage, passes), (name, (H, W, heads, dim)) in itertools.product(
        dict(forward=2, backward=3).items(), streams.items()
    ):
        C = 78 if name == 'B0' else heads * dim

        def apply(option: tuple, stage: str = stage) -> None:
            norm.LAUNCH[stage] = option
            norm._tiling.cache_clear()

        def make(form: str = '', stage: str = stage, H: int = H, W: int = W, C: int = C):
            x, grad = (random(batch, H, W, C, device=device) for _ in range(2))
            weight, bias = torch.rand(C, device=device), torch.rand(C, device=device)
            if form:
                half = weight.to(DTYPE), bias.to(DTYPE)
                return lambda: F.layer_norm(x, (C,), *half, 1e-6)
            if stage == 'forward':
                return lambda: norm.forward(x, weight, bias, 1e-6, DTYPE)
            return lambda: norm.backward(grad, x, weight, 1e-6, True)

        others = dict(torch=lambda make=make: make('torch')) if stage == 'forward' else {}
        moved = 2 * passes * batch * H * W * C
        yield Sweep(f'layer norm {stage}', name, moved, LAYER_NORM_LAUNCHES, apply, make, others)


def sweeps(device: str) -> Iterator[Sweep]:
    """All sweeps; on a CPU one small shape of each, with two ways to launch it."""
    if device == 'cuda':
        streams, hidden, linear, batch = STREAMS, HIDDEN, LINEAR, BATCH
    else:
        streams, hidden, linear, batch = dict(S=(9, 8, 1, 16)), dict(S=(6, 5, 32)), [(16, 32, 8)], 2
    kinds = (
        layer_norm_sweeps, attention_sweeps, depthwise_sweeps, linear_sweeps, norm_sweeps,
    )  # fmt: skip
    for kind, shapes in zip(kinds, (streams, streams, hidden, linear, hidden)):
        for sweep in kind(batch, shapes, device):
            yield sweep if device == 'cuda' else sweep._replace(options=sweep.options[:2])


def entries(sweep: Sweep) -> Iterator[tuple[str, Callable]]:
    """What is timed of a sweep, by the names of the options."""
    run = sweep.make()
    for option in sweep.options:

        def step(option: tuple = option) -> None:
            sweep.apply(option)
            run()

        yield str(option), step
    for name, make in sweep.others.items():
        yield name, make()


def warm(device: str, part: int, parts: int, emit: Callable) -> None:
    """Compile one part of all kernels ahead."""
    steps = ((sweep, step) for sweep in sweeps(device) for _, step in entries(sweep))
    for _, step in itertools.islice(steps, part, None, parts):
        try:
            step()
        except Exception:
            traceback.print_exc()  # run() meets it again, and emits it


def run(device: str, capture: Callable, emit: Callable) -> None:
    """Time all sweeps.

    Args:
        device (str): ``'cuda'``, or ``'cpu'`` with Triton's interpreter.
        capture (Callable): Records a function in a CUDA graph.
        emit (Callable): Takes the results.
    """
    reason = triton_support.why_not(torch.device(device))
    if reason:
        emit(skipped=reason)
        return
    calls = CALLS if device == 'cuda' else 1
    for sweep in sweeps(device):
        what, steps = dict(kernel=sweep.kernel, shape=sweep.shape), {}
        for name, step in entries(sweep):

            def repeat(step: Callable = step) -> None:
                for _ in range(calls):
                    step()

            try:
                repeat()
                steps[name] = capture(repeat, None, device)
            except Exception as err:
                traceback.print_exc()
                emit(**what, option=name, error=f'{type(err).__name__}: {err}'[:300])
        options = 3, 2, 0.01 if device == 'cuda' else 0.0
        times = bm.time_rounds(steps, *options, device) if steps else {}
        for name, found in times.items():
            us = 1e6 * bm.quartiles(found.seconds)[1] / calls
            rounds = [round(1e6 * seconds / calls, 3) for seconds in found.seconds]
            emit(**what, option=name, us=round(us, 3), tb_s=round(sweep.moved / us / 1e6, 3),
                 rounds=rounds)  # fmt: skip

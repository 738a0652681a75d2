"""Comparison of launch options of the Triton kernels, for the shapes in the models."""

from __future__ import annotations

import itertools
import os
import re
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import benchmark_measure as bm
import torch
import torch.nn.functional as F
from torch import Tensor

from mmhrformer.ops import kernels

CALLS = 10  # in one CUDA graph, so that launches do not dominate
# Triton's interpreter multiplies bfloat16 wrongly, as if the bits were integers.
DTYPE = torch.float16 if os.environ.get('TRITON_INTERPRET') else torch.bfloat16
BATCH = 64
# Height, width, heads, head dim: the streams of HRFormer-S and of HRFormer-B.
STREAMS = dict(S0=(64, 48, 1, 32), S1=(32, 24, 2, 32), B0=(64, 48, 2, 40))
# Height, width and channels inside FFNs.
HIDDEN = dict(S0=(64, 48, 128), S2=(16, 12, 512), B0=(64, 48, 312))
# Rows per image, channels, channels of all heads (39 are padded to 40) and channels inside FFNs:
# the streams of folded models, and the first one of HRFormer-B without padded channels.
LINEAR = dict(S0=(3072, 32, 32, 128), S1=(768, 64, 64, 256), S2=(192, 128, 128, 512),
              B0=(3072, 80, 80, 312), B1=(768, 160, 160, 624), B2=(192, 312, 320, 1248),
              plain_B0=(3072, 78, 80, 312))  # fmt: skip
PARTS = 'qkv', 'proj', 'fc1', 'fc2', 'plain qkv', 'plain fc1'  # of a block; without normalization
DEPTHWISE_TILES = [
    (16, 8, 64, 4), (8, 8, 64, 4), (32, 8, 64, 4), (16, 16, 64, 4), (16, 16, 64, 8), (16, 4, 64, 2),
    (16, 4, 128, 4), (16, 16, 32, 4), (16, 8, 64, 4, False, 1), (16, 8, 64, 4, False, 3),
    (32, 4, 64, 2), (16, 8, 128, 8), (64, 8, 64, 4), (32, 8, 64, 4, False, 3),
]  # fmt: skip
LINEAR_TILES = [
    (128, 128, 64, 1, 8, 3), (128, 128, 64, 1, 4, 3), (128, 64, 64, 1, 4, 3),
    (128, 32, 64, 1, 4, 3), (64, 128, 64, 1, 4, 3), (64, 64, 64, 1, 4, 3),
    (128, 64, 32, 1, 4, 4), (64, 128, 32, 1, 4, 3), (128, 128, 32, 1, 8, 4),
    (128, 128, 128, 1, 8, 2), (128, 64, 128, 1, 4, 2), (64, 128, 128, 1, 4, 2),
    (64, 256, 64, 1, 8, 3), (64, 256, 128, 1, 8, 2), (128, 256, 128, 1, 8, 2),
    (64, 64, 128, 1, 4, 3), (128, 128, 16, 1, 8, 4), (64, 128, 16, 1, 4, 4),
]  # fmt: skip
# Rows, outputs, warps, stages and minimum number of programs.
NORM_TILES = [
    (64, 64, 4, 2, 528), (64, 128, 4, 2, 528), (128, 64, 8, 2, 528), (64, 64, 8, 2, 528),
    (64, 32, 4, 2, 528), (64, 64, 4, 3, 528), (64, 64, 4, 1, 528), (64, 64, 4, 2, 264),
    (64, 64, 8, 2, 264), (64, 64, 4, 2, 1056), (64, 64, 8, 2, 1056), (64, 32, 8, 2, 528),
    (64, 64, 8, 1, 528), (64, 128, 8, 2, 528), (128, 128, 8, 2, 528),
]  # fmt: skip
# Height, width, channels and factors of the coarser maps.
EXCHANGES = dict(
    S0=(64, 48, 32, (2, 4, 8)), B0=(64, 48, 80, (2, 4, 8)), B1=(32, 24, 160, (1, 2, 4))
)
EXCHANGE_OPTIONS = list(itertools.product((8, 4, 2), (128, 64, 32)))  # rows, groups of channels
NORM_LAUNCHES = [
    (4096, 1024, 4), (4096, 2048, 4), (4096, 4096, 4), (2048, 4096, 4), (8192, 1024, 8),
    (8192, 4096, 8),
]  # fmt: skip
# Elements of a tile, warps, and maximum number of programs of the backward kernel.
LAYER_NORM_LAUNCHES = dict(
    forward=[(2048, 4), (4096, 4), (4096, 8), (8192, 4)],
    backward=[(2048, 4, 1024), (4096, 4, 1024), (4096, 4, 640), (4096, 8, 1024), (8192, 4, 1024)],
)
# Relative norm of the difference of two options' results up to which it counts as rounding.
LIMIT = 0.02
# Number of maps read or written, by kernel.
NORM_PASSES = dict(moments=1, normalize=2, gradient_sums=2, input_gradient=3)
LAYER_NORM_PASSES = dict(forward=2, backward=3)
ATTENTION_OPTIONS = dict(
    forward=list(itertools.product((528, 1056, 2112), (2, 4), (1, 2))),
    queries=list(itertools.product((264, 528), (4, 8), (1, 2))),
)


class Sweep(NamedTuple):
    """A kernel for a shape, and its launch options."""

    kernel: str
    shape: str
    moved: int  # numbers to read and write
    options: list
    apply: Callable  # sets one of the options
    run: Callable
    torch: Callable | None = None  # the same in torch


def attention(kind: str, name: str, B: int, H: int, W: int, heads: int, dim: int) -> Sweep:
    """Window attention or its gradients."""
    from mmhrformer.ops import triton_attention as attention

    def apply(option: tuple) -> None:
        attention.OPTIONS[kind] = dict(zip(('programs', 'num_warps', 'num_stages'), option))

    C = heads * dim
    qkv, pad, grad = random(B, H, W, 3 * C), random(3 * C), random(B, H, W, C)
    args = qkv, pad, torch.randn(169, heads), heads, 7, dim**-0.5
    run = lambda: attention.window_attention(*args)  # noqa: E731
    if kind == 'queries':
        run = lambda: attention.attention_backward(grad, *args, False)  # noqa: E731
    passes = 4 if kind == 'forward' else 7
    options = ATTENTION_OPTIONS[kind]
    return Sweep(f'attention {kind}', name, passes * grad.numel(), options, apply, run)


def depthwise(name: str, B: int, H: int, W: int, C: int) -> Sweep:
    """Depth-wise convolution with GELU."""
    from mmhrformer.ops import triton_conv as conv

    def apply(option: tuple) -> None:
        conv.DEPTHWISE_TILES.clear()
        conv.DEPTHWISE_TILES[1 << 31] = conv.DepthwiseTile(*option)

    x, weight, bias = random(B, H, W, C).permute(0, 3, 1, 2), random(C, 1, 3, 3), random(C)
    run = lambda: conv.depthwise_gelu(x, weight, bias)  # noqa: E731
    plain = lambda: F.gelu(F.conv2d(x, weight, bias, padding=1, groups=C))  # noqa: E731
    return Sweep('depthwise', name, 2 * x.numel(), DEPTHWISE_TILES, apply, run, plain)


def linear(part: str, name: str, B: int, rows: int, C: int, heads: int, hidden: int) -> Sweep:
    """A linear layer of a folded block, with normalization in front or a residual behind."""
    from mmhrformer.ops import triton_linear

    normalizes, is_last = part in ('qkv', 'fc1'), part in ('proj', 'fc2')
    table, tile = triton_linear.LINEAR_TILES, triton_linear.LinearTile
    if normalizes:
        table, tile = triton_linear.NORM_TILES, triton_linear.NormTile

    def apply(option: tuple) -> None:
        table.update(dict.fromkeys(table, tile(*option)))

    what = part.split()[-1]
    K, N = dict(qkv=(C, 3 * heads), proj=(heads, C), fc1=(C, hidden), fc2=(hidden, C))[what]
    x, weight, bias = random(B * rows, K), random(N, K) * K**-0.5, random(N)
    residual = random(B * rows, N) if is_last else None
    tiles = [tile for tile in LINEAR_TILES if tile[1] <= 2 * N and tile[2] <= 2 * K]
    args = x, weight, bias, what.startswith('fc'), residual, 1e-6 if normalizes else None
    run = lambda: triton_linear.linear_forward(*args)  # noqa: E731
    moved = B * rows * (K + N + is_last * N)
    options = NORM_TILES if normalizes else tiles
    return Sweep(f'linear {part}', f'{name}: {K} to {N}', moved, options, apply, run)


def exchange(name: str, B: int, H: int, W: int, C: int, factors: tuple[int, ...]) -> Sweep:
    """The sum of a map and of coarser ones, with ReLU."""
    from mmhrformer.ops import triton_exchange as exchange

    def apply(option: tuple) -> None:
        exchange.ROWS, exchange.GROUPS = {option[0]: 0}, (option[1],)

    maps = [random(B, H // f, W // f, C).permute(0, 3, 1, 2) for f in (1, *factors)]
    moved = maps[0].numel() + sum(m.numel() for m in maps)
    run = lambda: exchange.exchange_sum(maps[0], maps[1:], factors, True, True)  # noqa: E731
    return Sweep('exchange', f'{name}: {factors}', moved, EXCHANGE_OPTIONS, apply, run)


def batch_norm(stage: str, name: str, B: int, H: int, W: int, C: int) -> Sweep:
    """A kernel of batch normalization with GELU."""
    from mmhrformer.ops import triton_norm as norm

    def apply(option: tuple) -> None:
        norm.LAUNCH[stage] = option

    x, grad = (random(B, H, W, C).permute(0, 3, 1, 2) for _ in range(2))
    weight, bias, mean, var = torch.rand(4, C).unbind()
    inputs, options = (x, mean, var, None), (0.1,)
    if stage != 'moments':
        statistics = norm.moments(*inputs, *options).unbind()
        sums = (torch.randn(2, C),) if stage == 'input_gradient' else ()
        inputs = (x,) if stage == 'normalize' else (grad, x)
        again = (False,) if stage == 'gradient_sums' else ()
        options = (*statistics, weight, bias, *sums, 1e-5, True, *again)
    run = lambda: getattr(norm, stage)(*inputs, *options)  # noqa: E731
    moved = NORM_PASSES[stage] * x.numel()
    return Sweep(f'norm {stage}', name, moved, NORM_LAUNCHES, apply, run)


def layer_norm(stage: str, name: str, B: int, H: int, W: int, C: int) -> Sweep:
    """Layer normalization or its gradients."""
    from mmhrformer.ops import triton_layer_norm as norm

    def apply(option: tuple) -> None:
        norm.LAUNCH[stage], (norm.PROGRAMS,) = option[:2], option[2:] or (norm.PROGRAMS,)

    x, grad, (weight, bias) = random(B, H, W, C), random(B, H, W, C), torch.rand(2, C)
    half = weight.to(DTYPE), bias.to(DTYPE)
    run = lambda: norm.backward(grad, x, weight, None, 1e-6, True)  # noqa: E731
    plain = None
    if stage == 'forward':
        run = lambda: norm.forward(x, weight, bias, 1e-6, DTYPE)  # noqa: E731
        plain = lambda: F.layer_norm(x, (C,), *half, 1e-6)  # noqa: E731
    moved = LAYER_NORM_PASSES[stage] * x.numel()
    options = LAYER_NORM_LAUNCHES[stage]
    return Sweep(f'layer norm {stage}', name, moved, options, apply, run, plain)


def random(*size: int) -> Tensor:
    """Random numbers."""
    return torch.randn(size).to(DTYPE)


def sweeps(device: str, only: str = '') -> Iterator[Sweep]:
    """Sweeps of kernels whose names match a regular expression, with inputs created lazily.

    On a CPU, one small shape of each.
    """
    B, streams, hidden, layers, few = BATCH, STREAMS, HIDDEN, LINEAR, None
    if device == 'cpu':
        B, streams, hidden, few = 2, dict(S=(9, 8, 1, 16)), dict(S=(6, 5, 32)), 2
        layers = dict(S=(8, 32, 32, 128))
    exchanges = EXCHANGES if device == 'cuda' else dict(S=(16, 8, 16, (2, 4)))
    rows = {name: (H, W, heads * dim) for name, (H, W, heads, dim) in streams.items()}
    rows['B0'] = (64, 48, 78) if device == 'cuda' else (6, 5, 39)  # heads are padded, maps not
    calls = [(layer_norm, s, name, B, *rows[name]) for s in LAYER_NORM_PASSES for name in rows]
    calls += [(attention, k, name, B, *s) for k in ATTENTION_OPTIONS for name, s in streams.items()]
    calls += [(depthwise, name, B, *size) for name, size in hidden.items()]
    calls += [(linear, part, name, B, *size) for name, size in layers.items() for part in PARTS]
    calls += [(exchange, name, B, *size) for name, size in exchanges.items()]
    calls += [(batch_norm, s, name, B, *size) for s in NORM_PASSES for name, size in hidden.items()]
    for make, *args in calls:
        with torch.device(device):
            sweep = make(*args)
        if not re.search(only, f'{sweep.kernel} {sweep.shape}'):
            continue
        yield sweep._replace(options=sweep.options[:few])


def entries(sweep: Sweep) -> dict[str, Callable]:
    """The timed steps of a sweep."""

    from mmhrformer.ops.triton_launch import planned

    def step(option: tuple) -> object:
        sweep.apply(option)
        planned.cache_clear()
        return sweep.run()

    steps = {str(option): partial(step, option) for option in sweep.options}
    return {**steps, **({'torch': sweep.torch} if sweep.torch else {})}


def results(step: Callable) -> Tensor:
    """All numbers that a step computes, and NaN where it does not write."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        found = step()
    finally:
        torch.use_deterministic_algorithms(False)
    found = found if isinstance(found, (tuple, list)) else [found]
    return torch.cat([x.detach().float().flatten() for x in found if x is not None])


def prepare(sweep: Sweep, calls: int, capture: Callable, emit: Callable) -> dict[str, Callable]:
    """The timed steps of a sweep, several calls each, for options with equal results."""
    steps, expected = {}, None
    for name, step in entries(sweep).items():

        def repeat(step: Callable = step) -> None:
            for _ in range(calls):
                step()

        try:
            found = results(step)
            expected = found if expected is None else expected
            differs = ((found - expected).norm() / expected.norm()).item()
            if not differs < LIMIT:
                raise ValueError(f'differs from the first option by {differs:.3g}')
            steps[name] = capture(repeat)
        except Exception as err:
            traceback.print_exc()
            error = f'{type(err).__name__}: {err}'[:300]
            emit(kernel=sweep.kernel, shape=sweep.shape, option=name, error=error)
    return steps


def warm(device: str, only: str, part: int, parts: int, emit: Callable) -> None:
    """Compile one share of all kernels ahead."""
    steps = (step for sweep in sweeps(device, only) for step in entries(sweep).values())
    for step in itertools.islice(steps, part, None, parts):
        try:
            step()
        except Exception:
            traceback.print_exc()  # run() fails again, and emits it


def run(device: str, only: str, capture: Callable, emit: Callable) -> None:
    """Time all sweeps, in CUDA graphs; on a CPU with Triton's interpreter."""
    if reason := kernels.why_not(torch.device(device)):
        emit(skipped=reason)
        return
    calls, time = (CALLS, 0.01) if device == 'cuda' else (1, 0.0)
    for sweep in sweeps(device, only):
        steps = prepare(sweep, calls, lambda repeat: capture(repeat, None, device), emit)
        found = bm.time_rounds(steps, 3, 2, time) if steps else {}
        for name, measurement in found.items():
            us = 1e6 * measurement.median / calls
            tb_s = sweep.moved * DTYPE.itemsize / us / 1e6
            row = dict(us=round(us, 3), tb_s=round(tb_s, 3))
            emit(kernel=sweep.kernel, shape=sweep.shape, option=name, **row)

"""Kernels of Triton where there is no GPU: importing this makes them run on the CPU."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import pytest
import torch
from mmengine.utils import digit_version
from torch import Tensor

from mmhrformer.ops.triton_support import why_not

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
if DEVICE == 'cpu' and not why_not():
    import triton

    if digit_version(triton.__version__) >= digit_version('3.5'):  # others are built differently
        import triton_ir

        triton_ir.install()
        os.environ['TRITON_INTERPRET'] = '1'  # by which why_not allows them
KERNELS_ON_CPU = not why_not(torch.device('cpu'))
REASON = why_not(torch.device(DEVICE))  # to skip tests of kernels, empty if they run

# Relative errors of results and gradients, by data type.
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def plan_anew(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Let modules of kernels forget launches: their tables are others now, and in other tests."""
    for module in modules:
        monkeypatch.setattr(module, 'planned', cache(module.planned.__wrapped__))


def make_tiles_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles on small maps, of few numbers each, all of which are computed."""
    from mmhrformer.ops import triton_attention, triton_conv, triton_linear

    narrow = triton_conv.DepthwiseTile(rows=2, cols=4, channels=16, warps=1)
    wide = triton_conv.DepthwiseTile(rows=4, cols=8, channels=32, warps=1, ahead=False, stages=2)
    monkeypatch.setattr(triton_conv, 'DEPTHWISE_TILES', {9: narrow, 1 << 31: wide})
    tile = triton_linear.LinearTile(m=64, n=32, k=64, group=2, warps=4, stages=2)
    tiles = dict.fromkeys(triton_linear.LINEAR_TILES, tile)
    monkeypatch.setattr(triton_linear, 'LINEAR_TILES', tiles)
    tile = triton_linear.NormTile(m=64, n=32, warps=4, stages=2, programs=3)
    monkeypatch.setattr(triton_linear, 'NORM_TILES', {96: tile})
    for kernel in ('forward', 'queries', 'keys'):
        monkeypatch.setitem(triton_attention.OPTIONS, kernel, dict(programs=4))
    monkeypatch.setitem(triton_attention.OPTIONS, 'reduce', dict(block=128))
    plan_anew(monkeypatch, triton_attention, triton_conv, triton_linear)


def make(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    tensor = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    if len(shape) == 4 and shape[1] > 1:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.requires_grad_(grad)


def check(function, plain, tensors: list[Tensor | None], bound: float) -> None:
    """Compare results and gradients, relative to their norms, with float64."""
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    out, expected = function(*tensors), plain(*doubles)
    assert out.dtype == tensors[0].dtype
    assert out.shape == expected.shape
    # Not the memory format of the output.
    arriving = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=torch.float64)
    arriving = arriving.view(out.shape)
    ours = [t for t in tensors if t is not None]
    grads = torch.autograd.grad(out, ours, arriving.to(out.dtype))
    theirs = torch.autograd.grad(expected, [t for t in doubles if t is not None], arriving)
    for a, b, like in zip((out, *grads), (expected, *theirs), (out, *ours)):
        assert a.dtype == like.dtype
        assert (a.double() - b).norm() <= bound * b.norm()

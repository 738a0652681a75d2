"""Whole models whose kernels have the tiles that they have on GPUs, against torch in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from short_models import check, distance, expected, images, make
from smooth import smooth
from torch import Tensor, nn
from triton_on_cpu import DEVICE, REASON

from mmhrformer import fuse_for_inference, ops

if REASON:
    pytest.skip(REASON, allow_module_level=True)

SIZE = (64, 48)  # whose streams are no multiples of a window
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def cases(*rows: tuple, fast: int = 1) -> Iterator[Any]:
    """Arguments of tests, of which the first are fast enough for each change."""
    for i, row in enumerate(rows):
        name = '-'.join(str(value).removeprefix('torch.') for value in row)
        yield pytest.param(*row, id=name, marks=[pytest.mark.slow] if i >= fast else [])


@pytest.mark.parametrize(
    ('arch', 'dtype', 'form'),
    cases(
        ('base', torch.bfloat16, 'folded'),
        ('small', torch.float16, 'plain'),
        ('tiny', torch.bfloat16, 'folded'),
        ('tiny', torch.float32, 'plain'),
        ('small', torch.bfloat16, 'folded'),
        ('base', torch.float16, 'folded'),
        ('base', torch.float32, 'folded'),
        ('base', torch.bfloat16, 'plain'),
        fast=2,
    ),
)
def test_outputs(arch, dtype, form):
    model = copy.deepcopy(make(arch)).to(DEVICE, dtype)
    with torch.no_grad(), ops.use('kernels'):
        model = fuse_for_inference(model) if form == 'folded' else model
        outs = model(images(size=SIZE).to(DEVICE, dtype))
    assert {out.dtype for out in outs} == {dtype}
    check(outs, expected(arch, size=SIZE), LIMITS[dtype])


def gradients(model: nn.Module, backend: str, dtype: torch.dtype, x: Tensor) -> list[Tensor]:
    """Those of all parameters; in 16 bits of a model that is trained with AMP."""
    model = copy.deepcopy(model)
    low = dtype if dtype.itemsize == 2 else None
    with ops.use(backend):
        with torch.autocast(DEVICE, low, enabled=low is not None):
            loss = sum(out.square().mean() for out in model(x))
        loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ('arch', 'dtype'),
    cases(
        ('small', torch.float32),
        ('tiny', torch.bfloat16),
        ('small', torch.float16),
        ('base', torch.float32),
        ('base', torch.bfloat16),
    ),
)
def test_gradients(arch, dtype):
    """They are as close to those in float64 as torch's are."""
    model, x = smooth(copy.deepcopy(make(arch))).train().to(DEVICE), images(size=SIZE).to(DEVICE)
    ours, plain = (gradients(model, backend, dtype, x) for backend in ('kernels', 'reference'))
    exact = gradients(model.double(), 'reference', torch.float64, x.double())
    assert len(ours) == len(plain) == len(exact)
    check(ours, exact, 2 * distance(plain, exact))

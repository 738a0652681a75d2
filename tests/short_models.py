"""Backbones of the real widths with one block of a kind, and how far results may be apart."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmhrformer import HRFormer, ops
from mmhrformer.models.hrformer import ARCHS

SIZE = (96, 80)  # neither is a multiple of a window in any stream


def randomize(module: nn.Module) -> nn.Module:
    """Give normalizations statistics and scales that matter, and biases to tables and layers."""
    for name, tensor in module.state_dict().items():
        if name.endswith('running_var') or ('norm' in name and name.endswith('weight')):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(('bias', 'bias_table', 'running_mean')):
            tensor.normal_(std=0.1)
    return module


@functools.cache
def make(arch: str, **options) -> HRFormer:
    """A backbone of the real widths with one block of a kind; copy it before it is changed."""
    torch.manual_seed(0)
    short = {**ARCHS[arch], 'num_modules': (1, 1, 1), 'num_blocks': 1}
    return randomize(HRFormer(arch=short, upsample='bilinear', **options)).eval()


@functools.cache
def images(seed: int = 1, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def expected(arch: str, seed: int = 1, size: tuple[int, int] = SIZE) -> list[Tensor]:
    with ops.use('reference'), torch.no_grad():
        return copy.deepcopy(make(arch)).double()(images(seed, size).double())


def distance(ours: Iterable[Tensor], plain: Iterable[Tensor], least: float = 0.0) -> float:
    """The norm of all differences in parts of that of all values, or of the least that counts."""
    pairs = [(a.detach().double().cpu(), b.detach().double().cpu()) for a, b in zip(ours, plain)]
    error = sum((a - b).square().sum() for a, b in pairs).sqrt().item()
    return error / max(sum(b.square().sum() for _, b in pairs).sqrt().item(), least)


def check(
    ours: Iterable[Tensor], plain: Iterable[Tensor], limit: float, least: float = 0.0
) -> None:
    """Compare the :func:`distance` with a limit."""
    found = distance(ours, plain, least)
    print(f'distance {found:.1e}, limit {limit:.0e}')  # shown by pytest -rP
    assert found < limit

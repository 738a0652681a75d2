"""Shared fixtures of the GPU tests.

To find mistakes in the tests themselves, ``MMHRFORMER_TEST_DEVICE=cpu`` runs them on a CPU, without
what only CUDA has: graphs, ``AmpOptimWrapper``, NCCL, counts of memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope='session', autouse=True)
def device() -> torch.device:
    """Device of the tests, which are skipped without a GPU."""
    kind = os.environ.get('MMHRFORMER_TEST_DEVICE', 'cuda')
    if kind == 'cuda' and not torch.cuda.is_available():
        pytest.skip('needs a GPU: torch.cuda.is_available() is False')
    # The deterministic mode wants it to be set before cuBLAS is first used.
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    return torch.device(kind)


@pytest.fixture
def on_cuda(device) -> bool:
    """Whether this is no trial run on a CPU."""
    return device.type == 'cuda'


@pytest.fixture(autouse=True)
def numerics() -> Iterator[None]:
    """Products of float32 that are exact to its last bits; a test may change what it likes."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    choices = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, value in zip(flags, before):
        flag.allow_tf32 = value
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = choices
    torch.use_deterministic_algorithms(False)

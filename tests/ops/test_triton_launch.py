"""Launches of kernels, and when calls of operators skip torch's dispatch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmhrformer.ops.triton_support import is_recorded, why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)


def test_launches_where_no_kernel_is_interpreted():
    file = Path(__file__).with_name('launches.py')
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '--noconftest', '-q', file],
        env={**os.environ, 'TRITON_INTERPRET': '0'},
        capture_output=True,
        text=True,
    )
    assert '8 passed' in result.stdout, result.stdout


def test_calls_that_somebody_records_are_those_of_operators():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(2)
    assert not is_recorded(x)
    assert is_recorded(torch.zeros(2, device='meta'))
    assert is_recorded(torch.nn.Parameter(x))
    with FlopCounterMode(display=False):
        assert is_recorded(x)
    assert torch.vmap(lambda x: x + int(is_recorded(x)))(x).tolist() == [1, 1]
    assert torch.jit.trace(lambda x: x + int(is_recorded(x)), x, check_trace=False)(x).tolist() == [
        1,
        1,
    ]
    assert torch.compile(lambda x: x + int(is_recorded(x)), backend='eager')(x).tolist() == [1, 1]

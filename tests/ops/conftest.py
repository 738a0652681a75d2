"""Shared fixtures of the operators' tests."""

from __future__ import annotations

import pytest
import torch
from triton_on_cpu import DEVICE, prepare_interpreter

from mmhrformer.ops.triton_support import why_not


@pytest.fixture(autouse=True, scope='session')
def interpreter() -> None:
    """Triton's interpreter, where there is no GPU."""
    if DEVICE == 'cpu' and not why_not(torch.device('cpu')):
        prepare_interpreter()

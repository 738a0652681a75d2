"""A backend for tests of ``torch.compile`` that records its graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mmengine.utils import digit_version

from mmhrformer.deploy.compile import FIRST_TORCH

can_compile_blocks = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version(FIRST_TORCH),
    reason=f'needs torch {FIRST_TORCH}',
)


class Graphs(list):
    """A backend that lists the graphs and runs them as they are."""

    def __init__(self) -> None:
        super().__init__()
        torch._dynamo.reset()  # what other tests compiled is not asked for again

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> Callable:
        self.append(module)
        return module.forward

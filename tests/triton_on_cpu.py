"""Triton's interpreter, for kernels where there is no GPU: to be imported before Triton is."""

from __future__ import annotations

import os
from functools import cache

import torch

DEVICE = 'cpu' if os.environ.get('TRITON_INTERPRET') or not torch.cuda.is_available() else 'cuda'
if DEVICE == 'cpu':
    os.environ['TRITON_INTERPRET'] = '1'


@cache
def let_range_take_numbers() -> None:
    """Numbers known at run time only are arrays there, which NumPy 2.4 takes for no integers."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, '__index__', lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_index

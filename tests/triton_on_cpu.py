"""Triton's interpreter, for kernels where there is no GPU: to be imported before Triton is."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

DEVICE = 'cpu' if os.environ.get('TRITON_INTERPRET') or not torch.cuda.is_available() else 'cuda'
if DEVICE == 'cpu' and find_spec('triton'):
    os.environ['TRITON_INTERPRET'] = '1'
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor, scope):
        """Let ``range`` take numbers known at run time, kept as arrays that NumPy 2.4 refuses."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, '__index__', lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_index

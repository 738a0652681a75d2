"""Networks without kinks, whose gradients can be compared."""

from __future__ import annotations

from torch import nn


def smooth(module: nn.Module) -> nn.Module:
    """Put SiLU in the place of each ReLU.

    Rounding moves some inputs of ReLU across zero, where its slope jumps: noise of 1e-6 in the
    images changes the gradients of HRFormer-S by 5e-3, without ReLU by 1e-5.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.SiLU())
    return module

"""Float32 gradients on the CPU follow the float64 ones: no memory layout is mishandled."""

from __future__ import annotations

import copy

import pytest
import torch

from mmhrformer import HRFormer

ARCH = dict(channels=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), num_modules=(1, 1, 1), num_blocks=1)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('upsample', ['nearest', 'bilinear'])
def test_float32_gradients_follow_float64(upsample, memory_format):
    """torch 2.1's GELU backward on the CPU is wrong for some mixtures of layouts."""
    torch.manual_seed(0)
    model = HRFormer(ARCH, upsample=upsample).train()
    exact = copy.deepcopy(model).double()
    image = torch.randn(2, 3, 64, 96)
    for net, x in ((model, image.contiguous(memory_format=memory_format)), (exact, image.double())):
        sum(stream.square().mean() for stream in net(x)).backward()
    norms = torch.stack([p.grad.norm() for p in exact.parameters()])
    errors = torch.stack(
        [(p.grad.double() - q.grad).norm() for p, q in zip(model.parameters(), exact.parameters())]
    )
    relative = (errors / norms)[norms > 1e-6]  # the others are analytically zero
    assert relative.median() < 1e-4
    assert relative.max() < 0.05

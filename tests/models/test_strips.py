"""Inference in pieces gives what inference in one piece gives."""

from __future__ import annotations

import pytest
import torch

from mmhrformer import HRFormer, fuse_for_inference
from mmhrformer.models import strips

ARCH = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)


@pytest.mark.parametrize('piece', [1, 2_000, 20_000])
@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('size', [(64, 96), (97, 161)])
def test_pieces_add_up_to_the_whole(size, fused, piece, monkeypatch):
    torch.manual_seed(0)
    model = HRFormer(ARCH)
    model(torch.rand(2, 3, 64, 64))  # gives the norms statistics
    model.eval()
    if fused:
        model = fuse_for_inference(model)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        whole = model(x)
        monkeypatch.setattr(strips, 'PIECE_SIZE', piece)
        for stream, expected in zip(model(x), whole):
            torch.testing.assert_close(stream, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('norm_cfg', [dict(type='BN'), dict(type='GN', num_groups=2)])
def test_statistics_of_the_map_are_never_those_of_a_piece(norm_cfg, monkeypatch):
    """Batch normalization in training mode, and group normalization in any."""
    torch.manual_seed(0)
    model = HRFormer(ARCH, norm_cfg=norm_cfg).train(norm_cfg['type'] == 'BN')
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        whole = model(x)[0]
        monkeypatch.setattr(strips, 'PIECE_SIZE', 1)
        torch.testing.assert_close(model(x)[0], whole, atol=1e-5, rtol=1e-5)

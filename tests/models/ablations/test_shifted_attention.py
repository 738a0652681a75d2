"""Attention in shifted windows, against mmpretrain's and against a slow reference."""

from __future__ import annotations

import pytest
import torch
from mmpretrain.models.utils import ShiftWindowMSA
from torch import Tensor

from mmhrformer import MODELS, LocalWindowSelfAttention, ShiftedWindowSelfAttention
from mmhrformer.ops import cuda, use


def make_attention(**options) -> ShiftedWindowSelfAttention:
    """Two heads of four channels, all parameters random, in float64."""
    torch.manual_seed(0)
    attn = ShiftedWindowSelfAttention(embed_dims=8, num_heads=2, **options).double()
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter)
    return attn


def make_map(height: int, width: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, height, width, 8, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------ mmpretrain


@pytest.mark.parametrize('shift', [None, 0, 1, 6])
def test_equals_mmpretrain_on_the_same_weights(shift):
    """Outputs and gradients; maps no larger than a window are not shifted by either."""
    for size in ((14, 14), (14, 28), (21, 14), (7, 14), (7, 7)):
        assert_equals_mmpretrain(size, make_attention(window_size=7, shift_size=shift))


def assert_equals_mmpretrain(size: tuple[int, int], ours: ShiftedWindowSelfAttention) -> None:
    theirs = ShiftWindowMSA(8, 2, 7, shift_size=ours.shift_size).double()
    missing, unexpected = theirs.w_msa.load_state_dict(ours.state_dict(), strict=False)
    assert (missing, unexpected) == (['relative_position_index'], [])
    if min(size) == 7:  # mmpretrain would move the result back that it had not moved
        theirs.shift_size = 0
    x = make_map(*size).requires_grad_()
    out, expected = ours(x), theirs(x.flatten(1, 2), size).unflatten(1, size)
    torch.testing.assert_close(out, expected)
    weight = make_map(*size)
    grads = torch.autograd.grad((out * weight).sum(), [x, *ours.parameters()])
    expected = torch.autograd.grad(
        (expected * weight).sum(), [x, *(theirs.w_msa.get_parameter(n) for n in names(ours))]
    )
    torch.testing.assert_close(grads, expected)


def names(module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


# ------------------------------------------------------------------ padded maps


def reference(attn: ShiftedWindowSelfAttention, x: Tensor) -> Tensor:
    """One query at a time, with the keys that the definition gives it."""
    window, heads, shift = attn.window_size, attn.num_heads, attn.shift_size
    batch, height, width, channels = x.shape
    top, left = (-height % window) // 2, (-width % window) // 2
    P, Q = height + -height % window, width + -width % window
    padded = x.new_zeros(batch, P, Q, channels)
    padded[:, top : top + height, left : left + width] = x
    real = torch.zeros(P, Q, dtype=torch.bool)
    real[top : top + height, left : left + width] = True
    qkv = padded @ attn.qkv.weight.T + attn.qkv.bias
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in qkv.split(channels, dim=-1))
    out = torch.zeros_like(q)

    def group(y: int, x: int) -> tuple:
        """Tokens see each other if their windows and the edges they come from are the same."""
        return (y - shift) % P // window, (x - shift) % Q // window, y < shift, x < shift

    tokens = [(y, x) for y in range(P) for x in range(Q)]
    for qy, qx in tokens:
        if not real[qy, qx]:
            continue
        keys = [t for t in tokens if group(*t) == group(qy, qx)]
        keys = [t for t in keys if real[t] or not attn.pad_mask]
        ky, kx = torch.tensor(keys).T
        logits = (q[:, qy, qx, None] * k[:, ky, kx]).sum(-1) / (channels // heads) ** 0.5
        if attn.relative_position_bias_table is not None:
            # In one window no token was moved past another of the same origin.
            offset = (qy - ky + window - 1) * (2 * window - 1) + (qx - kx + window - 1)
            logits = logits + attn.relative_position_bias_table[offset]
        weights = logits.softmax(1)  # (B, keys, head)
        out[:, qy, qx] = (weights[..., None] * v[:, ky, kx]).sum(1)
    out = out.flatten(-2) @ attn.proj.weight.T + attn.proj.bias
    return out[:, top : top + height, left : left + width]


@pytest.mark.parametrize('pad_mask', [False, True])
@pytest.mark.parametrize('with_rpe', [False, True])
def test_equals_the_slow_reference(with_rpe, pad_mask):
    options = dict(with_rpe=with_rpe, pad_mask=pad_mask)
    for *size, window, shift in (
        (8, 8, 4, 2),
        (7, 9, 4, 2),
        (5, 12, 4, 1),
        (6, 5, 4, 3),
        (10, 7, 3, 1),
    ):
        attn, x = make_attention(window_size=window, shift_size=shift, **options), make_map(*size)
        with torch.no_grad():
            torch.testing.assert_close(attn(x), reference(attn, x))


def test_masked_padding_has_no_influence():
    """Not even in gradients, if a group of tokens is all padding."""
    attn = make_attention(window_size=7, pad_mask=True)  # 3 rows of padding before, shift 3
    x = make_map(8, 8).requires_grad_()
    attn(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in attn.parameters())
    with torch.no_grad():
        before = attn(x)
        # Padded tokens are zero, so their keys and values are these biases; of real tokens they
        # are everywhere: queries gain the same for each key, outputs the same everywhere.
        attn.qkv.bias[8:16] += 5.0
        torch.testing.assert_close(attn(x), before)


def test_small_maps_are_not_shifted():
    shifted = make_attention(window_size=7)
    plain = LocalWindowSelfAttention(8, 2, 7).double()
    plain.load_state_dict(shifted.state_dict())
    for size in [(7, 20), (3, 3), (20, 5)]:
        x = make_map(*size)
        assert torch.equal(shifted(x), plain(x))
    x = make_map(8, 20)
    assert not torch.allclose(shifted(x), plain(x))


# ------------------------------------------------------------------ masks


def test_training_after_inference_mode():
    attn, x = make_attention(window_size=4), make_map(9, 9)
    with torch.inference_mode():
        expected = attn(x)
    out = attn(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('windows', [1, 4, 7])
def test_more_windows_than_a_kernel_takes(windows, monkeypatch):
    attn, x = make_attention(window_size=4), make_map(9, 9)
    with torch.no_grad(), use('cuda'):
        expected = attn(x)
        monkeypatch.setattr(cuda, 'MAX_WINDOWS', windows)
        torch.testing.assert_close(attn(x), expected)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_traced_pass_is_equal():
    attn, x = make_attention(window_size=4).eval(), make_map(9, 9)
    with torch.no_grad():
        traced = torch.jit.trace(attn, x)
        y = make_map(9, 9) * 2
        torch.testing.assert_close(traced(y), attn(y))


# ------------------------------------------------------------------ options


def test_is_registered_and_shifts_by_half_a_window():
    cfg = dict(type='mmhrformer.ShiftedWindowSelfAttention', embed_dims=8, num_heads=2)
    assert [MODELS.build(dict(cfg, window_size=w)).shift_size for w in (7, 4, 1)] == [3, 2, 0]


@pytest.mark.parametrize('shift', [-1, 7, 9])
def test_impossible_shift(shift):
    with pytest.raises(ValueError, match=rf'shift_size={shift}: expected a number from 0 to .* 6'):
        ShiftedWindowSelfAttention(8, 2, window_size=7, shift_size=shift)

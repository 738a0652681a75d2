"""Attention within windows, against a slow reference that is written out here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmhrformer import MODELS, LocalWindowSelfAttention
from mmhrformer.ops.windows import relative_position_index

# Windows of 3: several of them, one axis incomplete, both, smaller than one window, one token.
SIZES = [(6, 9), (6, 7), (8, 6), (7, 5), (2, 10), (2, 2), (1, 1)]


def make_attention(**options) -> LocalWindowSelfAttention:
    """Two heads of four channels, all parameters random, in float64."""
    torch.manual_seed(0)
    attn = LocalWindowSelfAttention(embed_dims=8, num_heads=2, **options).double()
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter)
    return attn


def make_map(height: int, width: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, height, width, 8, generator=generator, dtype=torch.float64)


def reference(attn: LocalWindowSelfAttention, x: Tensor, only_real: bool) -> Tensor:
    """One window, one head, one query at a time; keys are all tokens or only the real ones."""
    window, heads = attn.window_size, attn.num_heads
    batch, height, width, channels = x.shape
    top, left = (-height % window) // 2, (-width % window) // 2
    rows, cols = -(-height // window), -(-width // window)
    padded = x.new_zeros(batch, rows * window, cols * window, channels)
    padded[:, top : top + height, left : left + width] = x
    real = torch.zeros(padded.shape[1:3], dtype=torch.bool)
    real[top : top + height, left : left + width] = True
    qkv = padded @ attn.qkv.weight.T + attn.qkv.bias
    # (B, H, W, head, head_dim) each
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in qkv.split(channels, dim=-1))
    out = torch.zeros_like(q)
    tokens = [(y, x) for y in range(window) for x in range(window)]
    for y0 in range(0, rows * window, window):
        for x0 in range(0, cols * window, window):
            keys = [(y, x) for y, x in tokens if real[y0 + y, x0 + x] or not only_real]
            ky, kx = torch.tensor(keys).T
            for y, x in tokens:
                query = q[:, y0 + y, x0 + x, None]  # (B, 1, head, head_dim)
                logits = (query * k[:, y0 + ky, x0 + kx]).sum(-1) / (channels // heads) ** 0.5
                if attn.relative_position_bias_table is not None:
                    offset = (y - ky + window - 1) * (2 * window - 1) + (x - kx + window - 1)
                    logits = logits + attn.relative_position_bias_table[offset]
                weights = logits.exp() / logits.exp().sum(1, keepdim=True)  # (B, keys, head)
                out[:, y0 + y, x0 + x] = (weights[..., None] * v[:, y0 + ky, x0 + kx]).sum(1)
    out = out.flatten(-2) @ attn.proj.weight.T + attn.proj.bias
    return out[:, top : top + height, left : left + width]


@pytest.mark.parametrize('pad_mask', [False, True])
@pytest.mark.parametrize('with_rpe', [False, True])
def test_equals_the_slow_reference(with_rpe, pad_mask):
    attn = make_attention(window_size=3, with_rpe=with_rpe, pad_mask=pad_mask)
    for size in SIZES:
        x = make_map(*size)
        with torch.no_grad():
            expected = reference(attn, x, only_real=pad_mask)
            torch.testing.assert_close(attn(x), expected, msg=lambda m, s=size: f'{s}: {m}')


def test_masked_padding_has_no_influence():
    """A window that is larger than the map is then the same as global attention."""
    attn = make_attention(window_size=7, with_rpe=False)
    for size in ((7, 4), (4, 7), (4, 4)):
        x = make_map(*size)
        flat = x.flatten(1, 2)
        q, k, v = attn.qkv(flat).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        expected = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
        expected = attn.proj(expected).view_as(x)
        attn.pad_mask = True
        torch.testing.assert_close(attn(x), expected)
        attn.pad_mask = False
        assert (attn(x) - expected).abs().max() > 0.1


@pytest.mark.parametrize('pad_mask', [False, True])
def test_gradients_are_finite_and_reach_every_parameter(pad_mask):
    attn = make_attention(window_size=3, pad_mask=pad_mask)
    x = make_map(4, 5).requires_grad_()
    attn(x).square().sum().backward()
    for name, tensor in [('x', x), *attn.named_parameters()]:
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().sum() > 0, name


def test_windows_do_not_see_each_other():
    attn = make_attention(window_size=3)
    x = make_map(6, 6)
    other = x.clone()
    other[:, 3:, 3:] += 1
    difference = (attn(x) - attn(other)).abs().amax((0, 3))
    assert (difference[3:, 3:] > 0).all()
    difference[3:, 3:] = 0
    assert difference.max() == 0


def test_memory_layout_of_the_input_does_not_matter():
    attn = make_attention(window_size=3)
    x = make_map(6, 9)
    turned = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not turned.is_contiguous()
    torch.testing.assert_close(attn(turned), attn(x))


@pytest.mark.parametrize('pad_mask', [False, True])
def test_works_under_autocast(pad_mask):
    attn = make_attention(window_size=3, pad_mask=pad_mask).float()
    for parameter in attn.parameters():
        parameter.data.mul_(0.3)
    x = make_map(4, 5).float()
    with torch.autocast('cpu', torch.bfloat16):
        half = attn(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), attn(x), atol=0.03, rtol=0.03)


def test_bias_is_the_row_of_the_table_that_the_index_names():
    for window in (1, 2, 7):
        attn = make_attention(window_size=window)
        expected = attn.relative_position_bias_table[relative_position_index(window)]
        bias = attn.relative_position_bias(torch.float32)  # (1, heads, N, N)
        assert torch.equal(bias, expected.permute(2, 0, 1)[None].float())


def test_bias_table_starts_small_but_not_at_zero():
    torch.manual_seed(0)
    table = LocalWindowSelfAttention(32, 8).relative_position_bias_table
    assert table.shape == (169, 8)
    assert table.std().item() == pytest.approx(0.02, rel=0.1)


def test_without_bias_there_is_no_table_and_no_index_in_the_checkpoint():
    keys = {'qkv.weight', 'qkv.bias', 'proj.weight', 'proj.bias'}
    assert set(make_attention(with_rpe=False).state_dict()) == keys
    assert set(make_attention().state_dict()) == keys | {'relative_position_bias_table'}


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(embed_dims=30, num_heads=4), ['num_heads=4', 'embed_dims=30', 'divides']),
        (dict(embed_dims=32, num_heads=0), ['num_heads=0', 'embed_dims=32']),
        (
            dict(embed_dims=32, num_heads=2, window_size=0),
            ['window_size=0', 'expected a positive integer'],
        ),
    ],
)
def test_impossible_arguments_are_named(options, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        MODELS.build(dict(type='mmhrformer.LocalWindowSelfAttention', **options))
    for word in words:
        assert word in str(error.value)

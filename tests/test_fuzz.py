"""Random cases: forward passes against plain references, and damaged checkpoint files."""

from __future__ import annotations

import contextlib
import logging
import pickle
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmhrformer import HRFormer, LocalWindowSelfAttention, fuse_for_inference, load_checkpoint
from mmhrformer.checkpoints import read_checkpoint

pytestmark = pytest.mark.once
MICRO = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)


def examples(number: int) -> settings:
    """The same examples in every run, however long each takes."""
    return settings(max_examples=number, derandomize=True, deadline=None, database=None)


def fill(module: nn.Module) -> nn.Module:
    """Give a module random parameters and statistics, so that nothing is zero by chance."""
    torch.manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            low, high = (0.5, 1.5) if 'var' in name or 'norm' in name else (-0.2, 0.2)
            nn.init.uniform_(tensor.data, low, high)
    return module.eval()


# Attention


def reference(attn: LocalWindowSelfAttention, x: Tensor, only_real: bool) -> Tensor:
    """Softmax attention between all tokens of a map, of which only those of a window see another.

    Unlike the code under test nothing is cut into windows: the map is padded, and whether two
    tokens share a window, and how they lie to each other, is computed from their positions.
    """
    window, heads = attn.window_size, attn.num_heads
    batch, height, width, channels = x.shape
    top, left = (-height % window) // 2, (-width % window) // 2
    rows, cols = height + -height % window, width + -width % window
    padded = x.new_zeros(batch, rows, cols, channels)
    padded[:, top : top + height, left : left + width] = x
    real = x.new_zeros(rows, cols, dtype=torch.bool)
    real[top : top + height, left : left + width] = True
    y, x_ = (
        axis.flatten()
        for axis in torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing='ij')
    )
    together = (y[:, None] // window == y // window) & (x_[:, None] // window == x_ // window)
    offset = (y[:, None] - y + window - 1) * (2 * window - 1) + x_[:, None] - x_ + window - 1
    tokens = padded.flatten(1, 2)
    qkv = (tokens @ attn.qkv.weight.T + attn.qkv.bias).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, tokens, head_dim) each
    logits = q @ k.mT / (channels // heads) ** 0.5
    if attn.relative_position_bias_table is not None:
        logits = logits + attn.relative_position_bias_table[offset * together].permute(2, 0, 1)
    seen = together & real.flatten() if only_real else together
    seen = seen | ~seen.any(1, keepdim=True)  # of padding that sees nothing, nothing is returned
    out = logits.masked_fill(~seen, float('-inf')).softmax(-1) @ v
    out = out.transpose(1, 2).flatten(2) @ attn.proj.weight.T + attn.proj.bias
    return out.unflatten(1, (rows, cols))[:, top : top + height, left : left + width]


@examples(120)
@given(
    window=st.integers(1, 9),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    batch=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([4, 6, 18, 39]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    turned=st.booleans(),
    with_rpe=st.booleans(),
    pad_mask=st.booleans(),
    training=st.booleans(),
)
def test_attention_equals_the_plain_reference(
    window, height, width, batch, heads, head_dim, dtype, turned, with_rpe, pad_mask, training
):
    options = dict(with_rpe=with_rpe, pad_mask=pad_mask)
    attn = fill(LocalWindowSelfAttention(heads * head_dim, heads, window, **options)).to(dtype)
    x = torch.rand(batch, height, width, heads * head_dim, dtype=dtype)
    if turned:  # channels first in memory
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    with torch.set_grad_enabled(training):
        out = attn.train(training)(x)
    with torch.no_grad():
        expected = reference(attn, x, only_real=pad_mask)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    torch.testing.assert_close(out.detach(), expected, atol=1e-5, rtol=1e-5)


# Backbone


@st.composite
def archs(draw: Callable) -> dict:
    """Small architectures, of which heads divide channels."""
    heads = draw(st.tuples(*[st.integers(1, 3)] * 4))
    dims = draw(st.tuples(*[st.integers(1, 9)] * 4))
    return dict(
        channels=tuple(h * d for h, d in zip(heads, dims)),
        num_heads=heads,
        num_modules=draw(st.tuples(*[st.integers(1, 2)] * 3)),
        num_blocks=draw(st.integers(1, 2)),
        mlp_ratio=draw(st.sampled_from([1, 2, 4])),
    )


def images(batch: int, height: int, width: int, layout: str) -> Tensor:
    """Images in one of the layouts that come up; ``strided`` is a part of larger images."""
    if layout == 'strided':
        return torch.rand(batch, 3, height + 2, 2 * width)[..., 1:-1, ::2]
    x = torch.rand(batch, 3, height, width)
    return x.contiguous(memory_format=getattr(torch, layout))


def expected_shapes(model: HRFormer, x: Tensor) -> list[tuple[int, ...]]:
    """The options as documented by the class."""
    return [
        (
            len(x),
            model.arch['channels'][i],
            -(-x.shape[2] // 2 ** (i + 2)),
            -(-x.shape[3] // 2 ** (i + 2)),
        )
        for i in model.out_indices
    ]


IMAGES = st.builds(
    images,
    batch=st.integers(1, 2),
    height=st.integers(32, 97),
    width=st.integers(32, 97),
    layout=st.sampled_from(['contiguous_format', 'channels_last', 'strided']),
)
BACKBONES = st.builds(
    HRFormer,
    arch=archs(),
    window_size=st.integers(1, 9) | st.tuples(*[st.integers(1, 9)] * 4),
    with_rpe=st.booleans(),
    pad_mask=st.booleans(),
    upsample=st.sampled_from(['nearest', 'bilinear']),
    out_indices=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
)


@examples(16)
@given(model=BACKBONES, x=IMAGES, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_streams_have_the_documented_shapes_and_fusing_changes_none(model, x, dtype):
    model, x = fill(model).to(dtype), x.to(dtype)
    with torch.no_grad():
        outs = model(x)
        fused = fuse_for_inference(model)(x)
    assert [tuple(out.shape) for out in outs] == expected_shapes(model, x)
    for out, other in zip(outs, fused, strict=True):
        assert out.dtype == dtype
        assert out.isfinite().all()
        scale = out.abs().max().clamp(min=1)
        torch.testing.assert_close(out / scale, other / scale, atol=1e-4, rtol=1e-3)


@examples(8)
@given(model=BACKBONES, x=IMAGES)
def test_memory_format_of_images_does_not_matter(model, x):
    model = fill(model)
    with torch.no_grad():
        for out, other in zip(model(x), model(x.contiguous()), strict=True):
            scale = out.abs().max().clamp(min=1)
            torch.testing.assert_close(out / scale, other / scale, atol=1e-5, rtol=1e-5)


# Damaged checkpoints


@pytest.fixture(autouse=True, scope='module')
def quiet() -> Iterator[None]:
    """Hundreds of checkpoints are loaded here, each with a report."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(scope='module')
def weights() -> dict[str, Tensor]:
    return fill(HRFormer(arch=MICRO)).state_dict()


def saved(weights: dict[str, Tensor], path: Path, format: str) -> bytes:
    if format == 'safetensors':
        safetensors = pytest.importorskip('safetensors.torch')
        path.write_bytes(safetensors.save(weights))
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=format == 'zip')
    return path.read_bytes()


def damages(content: bytes, places: list[int], number: int) -> Iterator[bytes]:
    """One byte of some places changed, and then the file cut off at random."""
    generator = random.Random(0)
    for _ in range(number):
        damaged = bytearray(content)
        damaged[generator.choice(places)] ^= generator.randrange(1, 256)
        yield bytes(damaged)
    for _ in range(number // 10):
        yield content[: generator.randrange(len(content))]


def outcome(model: HRFormer, path: Path, weights: dict[str, Tensor]) -> str:
    """``refused`` in words that name the file, ``right`` tensors, or ``wrong`` ones.

    Other errors than those of the package come out.
    """
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    try:
        load_checkpoint(model, path, strict=True)
    except (ValueError, RuntimeError) as err:
        return 'refused' if path.name in str(err) else f'refused without the file name: {err}'
    loaded = model.state_dict()
    return 'right' if all(torch.equal(loaded[k], weights[k]) for k in weights) else 'wrong'


def outcomes(weights: dict, path: Path, contents: Iterator[bytes]) -> Counter:
    model, counts = HRFormer(arch=MICRO), Counter()
    for content in contents:
        path.write_bytes(content)
        counts[outcome(model, path, weights)] += 1
    return counts


def near(content: bytes, mark: bytes, before: int, after: int) -> list[int]:
    start = content.index(mark)
    return list(range(max(start - before, 0), min(start + after, len(content))))


@pytest.mark.parametrize('number', [20, pytest.param(116, marks=pytest.mark.slow)])
def test_no_damage_of_a_zip_file_goes_unnoticed(weights, tmp_path, number):
    """Wherever it is: in tensors, names, shapes, or what makes it a zip file."""
    content = saved(weights, tmp_path / 'a.pth', 'zip')
    end = content.rindex(b'PK\1\2', 0, content.rindex(b'PK\1\2')) - 2000
    names, structure = near(content, b'conv1.weight', 60, 4000), list(range(end, len(content)))
    heads = [i + j for i in range(len(content) - 4) if content[i : i + 4] == b'PK\3\4'
             for j in range(64)]  # fmt: skip
    counts = Counter()
    for places in (list(range(len(content))), names, structure, heads):
        counts += outcomes(weights, tmp_path / 'a.pth', damages(content, places, number))
    assert set(counts) <= {'refused', 'right'}
    assert counts['refused'] > 2 * number


def test_changed_numbers_in_a_zip_file_are_noticed(weights, tmp_path):
    content = saved(weights, tmp_path / 'a.pth', 'zip')
    place = content.index(weights['conv1.weight'].numpy().tobytes())
    damaged = bytearray(content)
    damaged[place + 100] ^= 1
    (tmp_path / 'a.pth').write_bytes(damaged)
    changed = torch.load(tmp_path / 'a.pth')['conv1.weight']  # torch itself does not notice
    assert not torch.equal(changed, weights['conv1.weight'])
    with pytest.raises(ValueError, match=r'a\.pth.*it is damaged.*data/.*again'):
        load_checkpoint(HRFormer(arch=MICRO), tmp_path / 'a.pth')


def test_tensors_marked_as_folders_are_noticed(weights, tmp_path):
    """torch would leave them as the memory was, without a word."""
    content = saved(weights, tmp_path / 'a.pth', 'zip')
    entry = content.rindex(b'PK\1\2', 0, content.rindex(b'data/0'))
    damaged = bytearray(content)
    damaged[entry + 38] ^= 0x10
    (tmp_path / 'a.pth').write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.pth.*it is damaged.*data/0' is not a file.*again"):
        load_checkpoint(HRFormer(arch=MICRO), tmp_path / 'a.pth')


def tensor_bytes(content: bytes, weights: dict[str, Tensor]) -> set[int]:
    """Positions of the tensors' data, in formats without checksums."""
    places: set[int] = set()
    for tensor in weights.values():
        data = tensor.contiguous().numpy().tobytes()
        start = content.find(data)
        while start >= 0:
            places |= set(range(start, start + len(data)))
            start = content.find(data, start + 1)
    return places


def test_a_wrong_number_in_a_pickle_does_not_take_the_memory(tmp_path):
    """Objects are numbered in it, and C's unpickler makes a list as long as the largest number."""
    content = b'\x80\x02}r\xff\xff\xff\x01.'  # an empty dict with the number 2**25 - 1
    (tmp_path / 'a.pth').write_bytes(content)
    peaks = []
    for read in (lambda: pickle.loads(content), lambda: read_checkpoint(tmp_path / 'a.pth')):
        tracemalloc.start()
        with contextlib.suppress(ValueError):
            read()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] > 2e8 > 1e7 > peaks[1]


@pytest.mark.parametrize('format', ['legacy', 'safetensors'])
def test_damage_outside_the_numbers_of_other_formats_is_refused_or_harmless(
    format, weights, tmp_path
):
    """These hold no checksums: what a changed byte makes of a number cannot be known."""
    content = saved(weights, tmp_path / 'a.pth', format)
    numbers = tensor_bytes(content, weights)
    places = [place for place in range(len(content)) if place not in numbers]
    assert len(places) > 5000
    counts = outcomes(weights, tmp_path / 'a.pth', damages(content, places, 80))
    assert set(counts) <= {'refused', 'right'}

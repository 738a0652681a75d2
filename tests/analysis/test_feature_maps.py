"""Pictures of what goes on inside: streams at their own resolutions, attention weights."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from needs import may_need

from mmhrformer import get_inferencer
from mmhrformer.analysis.feature_maps import (
    attention_of,
    attention_weights,
    draw_attention,
    draw_features,
    last_blocks,
    principal_component,
    stream_maps,
)
from mmhrformer.inferencers.media import Picture
from mmhrformer.models.attention import LocalWindowSelfAttention, window_merge, window_partition

SEG = 'ocrnet_hrformer-demo_1xb16-100_scenes-96x96'
POSE = 'td-hm_hrformer-demo_1xb16-2e_figures-96x128'
pytestmark = may_need('mmpose', 'mmseg')


@pytest.fixture(scope='module')
def segment():
    torch.manual_seed(0)
    return get_inferencer(SEG, False, device='cpu')


@pytest.fixture(scope='module')
def find_joints():
    torch.manual_seed(0)
    return get_inferencer(POSE, False, device='cpu')


@pytest.fixture(scope='module')
def image() -> Picture:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    pixels = cv2.resize(coarse, (101, 75), interpolation=cv2.INTER_LINEAR)
    return Picture('drawn', 'drawn', pixels)


@pytest.mark.parametrize('pad_mask', [False, True])
def test_weights_are_those_that_the_module_uses(pad_mask):
    torch.manual_seed(0)
    attention = LocalWindowSelfAttention(24, num_heads=3, window_size=5, pad_mask=pad_mask).eval()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(2, 13, 11, 24)
    weights = attention_weights(attention, x)
    assert weights.shape == (2 * 9, 3, 25, 25)
    assert torch.allclose(weights.sum(-1), torch.ones(18, 3, 25))
    values = attention.qkv(window_partition(x, 5)).unflatten(-1, (3, 3, 8))[:, :, 2]
    mixed = (weights @ values.transpose(1, 2)).transpose(1, 2).flatten(2)
    out = window_merge(attention.proj(mixed), 5, (13, 11))
    assert torch.allclose(out, attention(x), atol=1e-5)


def test_weights_of_the_place_that_was_asked_for(segment, image):
    blocks = last_blocks(segment.model.backbone)
    assert list(blocks) == [f'stage4.0.branches.{i}.0' for i in range(4)]
    seen = {}
    handles = [
        block.attn.register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, args[0]) is None or None
        )
        for name, block in blocks.items()
    ]
    found = attention_of(segment, image, query=(0.7, 0.2))
    for handle in handles:
        handle.remove()
    for one in found:
        height, width = seen[one.block].shape[1:3]
        assert one.size == (height, width)
        assert np.allclose(one.weights.sum((1, 2)), 1, atol=1e-5)
        # The place lies in the window, at the query, and the weights are that row's.
        left, top, across, down = one.window
        side = one.weights.shape[1]
        x = round(left * width) + one.query[1]
        y = round(top * height) + one.query[0]
        assert (x, y) == (int(0.7 * width), int(0.2 * height))
        assert (across * width, down * height) == pytest.approx((side, side))
        every = attention_weights(blocks[one.block].attn, seen[one.block])
        row = every[:, :, one.query[0] * side + one.query[1]].reshape(-1, *one.weights.shape)
        assert np.abs(row.numpy() - one.weights).reshape(len(row), -1).max(1).min() < 1e-6


def test_hooks_are_gone_afterwards(segment, image):
    draw_features(segment, image)
    draw_attention(segment, image)
    modules = list(segment.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_streams_at_their_own_resolutions(segment, find_joints, image):
    shapes = [stream.shape for stream in stream_maps(segment, image)]
    assert shapes == [(19, 26, 16), (10, 13, 32), (5, 7, 48), (3, 4, 64)]
    # The pose model returns only the finest stream; all four are there nevertheless.
    shapes = [stream.shape for stream in stream_maps(find_joints, image)]
    assert shapes == [(32, 24, 16), (16, 12, 32), (8, 6, 48), (4, 3, 64)]


def test_principal_component_is_the_direction_of_most_variance():
    rng = np.random.default_rng(0)
    pattern = np.linspace(-1, 1, 48).reshape(6, 8)
    features = pattern[..., None] * rng.normal(size=5) + 0.01 * rng.normal(size=(6, 8, 5)) + 3
    found = principal_component(features.astype(np.float32))
    assert (found.min(), found.max()) == (0, 1)
    assert abs(np.corrcoef(found.ravel(), pattern.ravel())[0, 1]) > 0.99
    assert np.array_equal(principal_component(np.ones((3, 3, 2))), np.zeros((3, 3)))


def test_streams_under_autocast(image):
    pose = get_inferencer(POSE, False, device='cpu', dtype='bfloat16')
    streams = stream_maps(pose, image)
    assert all(stream.dtype == np.float32 and np.isfinite(stream).all() for stream in streams)


def test_pictures(find_joints, image):
    pose, boxes = find_joints, np.array([[10, 5, 60, 70]], np.float32)
    four, boxed = draw_features(pose, image), draw_features(pose, image, boxes)
    assert four.dtype == np.uint8
    assert four.shape == boxed.shape
    assert not np.array_equal(four, boxed)
    rows = draw_attention(pose, image, query=(0.4, 0.6))
    row = draw_attention(pose, image, block='stage3.0.branches.1.0')
    assert rows.shape[0] > 2.5 * row.shape[0]
    assert min(one.std() for one in (four, rows, row)) > 10


def test_folded_models_show_features_but_no_attention(image):
    fused = get_inferencer(POSE, False, device='cpu', fuse=True)
    assert len(stream_maps(fused, image)) == 4
    with pytest.raises(ValueError, match=r'FusedWindowAttention.*fuse=False'):
        attention_of(fused, image)


def test_what_cannot_be_drawn(segment, find_joints, image):
    for options, message in (
        (dict(query=(0.5, 1.0)), r'query=\(0.5, 1.0\): expected x and y'),
        (dict(query=(0.5,)), 'expected x and y'),
        (dict(block='stage4.0.branches.9.0'), r'no such block. did you mean stage4\.0\.branches'),
    ):
        with pytest.raises(ValueError, match=message):
            attention_of(segment, image, **options)
    with pytest.raises(ValueError, match='no people found, nothing to draw; pass boxes'):
        draw_features(find_joints, image, np.zeros((0, 4), np.float32))

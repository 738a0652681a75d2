"""The OCR head and its auxiliary head, in mmseg's CascadeEncoderDecoder."""

from __future__ import annotations

import copy

import golden
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmhrformer import MODELS

SegDataSample = pytest.importorskip('mmseg.structures').SegDataSample
from mmhrformer import OCRAuxHead, OCRHead  # noqa: E402

TINY = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
CLASSES = 5
HEAD = dict(
    in_channels=TINY['channels'],
    in_index=(0, 1, 2, 3),
    input_transform='resize_concat',
    channels=12,
    num_classes=CLASSES,
)


# mmseg's remarks on its own defaults.
pytestmark = [
    pytest.mark.filterwarnings(f'ignore:{text}')
    for text in ('When align_corners=True', '``build_loss`` would', 'Default ``avg_non_ignore``')
]


def make_model():
    """A segmentor like that of the shipped configs, only smaller."""
    torch.manual_seed(0)
    cfg = ConfigDict(
        type='mmseg.CascadeEncoderDecoder',
        num_stages=2,
        backbone=dict(type='mmhrformer.HRFormer', arch=TINY),
        decode_head=[
            dict(
                type='mmhrformer.OCRAuxHead',
                loss_decode=dict(type='mmhrformer.WeightedCrossEntropyLoss', loss_weight=0.4),
                **HEAD,
            ),
            dict(
                type='mmhrformer.OCRHead',
                ocr_channels=8,
                loss_decode=dict(type='mmhrformer.OHEMCrossEntropyLoss', min_kept=100),
                **HEAD,
            ),
        ],
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg)
    golden.recipe.fill_module(model)
    return model


def batch(seed: int = 0, size: tuple[int, int] = (64, 96)):
    samples = []
    for i in range(2):
        label = golden.recipe.make_label_map((1, *size), CLASSES, seed + i, ignore_index=255)
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size))
        sample.gt_sem_seg = PixelData(data=torch.from_numpy(label))
        samples.append(sample)
    return golden.image((2, 3, *size), seed), samples


def make_head(kind: type, **options) -> nn.Module:
    head = kind(**{**HEAD, **options})
    golden.recipe.fill_module(head)
    return head.eval()


def streams(height: int = 64, width: int = 96, seed: int = 0) -> tuple[torch.Tensor, ...]:
    sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(2, 6)]
    return tuple(golden.image((2, c, *size), seed + c) for c, size in zip(TINY['channels'], sizes))


def total(losses: dict) -> torch.Tensor:
    return sum(value for name, value in losses.items() if 'loss' in name)


def counters(model: nn.Module) -> set[int]:
    """How often the statistics of the batch normalizations were updated."""
    return {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, _BatchNorm)}


@pytest.mark.parametrize('size', [(32, 32), (64, 96), (97, 161)])
def test_logits_have_the_size_of_the_finest_stream(size):
    xs = streams(*size)
    aux, ocr = make_head(OCRAuxHead), make_head(OCRHead, ocr_channels=8)
    expected = (2, CLASSES, -(-size[0] // 4), -(-size[1] // 4))
    prev = aux(xs)
    assert prev.shape == expected
    assert ocr(xs, prev).shape == expected


def test_regions_are_means_over_all_positions_weighted_by_a_softmax():
    pixels, logits = golden.image((1, 3, 4, 5)), golden.image((1, 2, 4, 5), seed=1)
    regions = OCRHead.gather_regions(pixels, logits)
    assert regions.shape == (1, 3, 2, 1)
    for k in range(2):
        weights = logits[0, k].exp() / logits[0, k].exp().sum()
        torch.testing.assert_close(regions[0, :, k, 0], (pixels[0] * weights).sum((1, 2)))


def test_pixels_attend_to_regions():
    attention = make_head(OCRHead, ocr_channels=8).object_attention
    pixels, regions = golden.image((1, 12, 3, 4)), golden.image((1, 12, CLASSES, 1), seed=1)
    context = attention(pixels, regions)
    query, key = attention.f_pixel(pixels)[0], attention.f_object(regions)[0, ..., 0]
    value = attention.f_down(regions)[0, ..., 0]
    for y in range(3):
        for x in range(4):
            weights = (query[:, y, x] @ key / 8**0.5).softmax(0)
            seen = (value * weights).sum(1).view(1, 8, 1, 1)
            torch.testing.assert_close(context[:, :, y, x], attention.f_up(seen)[..., 0, 0])


def test_dropout_is_that_of_the_official_code():
    head = make_head(OCRHead)
    assert isinstance(head.dropout, nn.Dropout2d)
    assert head.dropout.p == 0.05
    assert make_head(OCRAuxHead).dropout is None
    assert make_head(OCRHead, dropout_ratio=0.2).dropout.p == 0.2


def test_corners_are_aligned_unless_told_otherwise():
    assert make_head(OCRHead).align_corners
    assert make_head(OCRAuxHead).align_corners
    assert not make_head(OCRHead, align_corners=False).align_corners


def test_training_steps_update_every_statistic_once():
    model = make_model().train()
    for step in (1, 2):
        losses = model.loss(*batch(seed=step))
        assert counters(model) == {step}
        total(losses).backward()
    assert {'decode_0.loss_ce', 'decode_1.loss_ohem'} < set(losses)


def test_losses_are_those_of_the_two_logits():
    model = make_model().train()
    model.decode_head[1].dropout = None
    inputs, samples = batch()
    losses = copy.deepcopy(model).loss(inputs, samples)
    aux, ocr = model.decode_head
    xs = model.extract_feat(inputs)
    aux_logits = aux(xs)
    expected = {
        'decode_0.loss_ce': aux.loss_by_feat(aux_logits, samples)['loss_ce'],
        'decode_1.loss_ohem': ocr.loss_by_feat(ocr(xs, aux_logits), samples)['loss_ohem'],
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_loss_of_the_ocr_head_also_trains_the_auxiliary_head():
    model = make_model().train()
    losses = model.loss(*batch())
    losses['decode_1.loss_ohem'].backward()
    assert model.decode_head[0].conv_seg.weight.grad.abs().sum() > 0


def test_second_step_does_not_see_the_logits_of_the_first():
    model = make_model().train()
    model.decode_head[1].dropout = None
    model.loss(*batch(seed=0))
    expected = copy.deepcopy(model).loss(*batch(seed=5))
    losses = model.loss(*batch(seed=5))
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_kept_logits_are_for_the_same_inputs_only():
    aux = make_head(OCRAuxHead)
    _, samples = batch()
    xs, others = streams(), streams(seed=7)
    expected = aux(others)
    aux.loss(xs, samples, {})
    assert torch.equal(aux(others), expected)
    assert not torch.equal(aux(xs), expected)


def test_kept_logits_are_used_once():
    aux = make_head(OCRAuxHead)
    _, samples = batch()
    xs = streams()
    aux.loss(xs, samples, {})
    first = aux(xs)
    nn.init.zeros_(aux.conv_seg.weight)
    assert torch.equal(aux(xs), aux.conv_seg.bias.view(1, -1, 1, 1).expand_as(first))


@pytest.mark.parametrize('size', [(64, 96), (97, 161), (45, 67)])
def test_prediction_after_a_training_step_has_the_size_of_the_image(size):
    model = make_model().train()
    model.loss(*batch())
    model.eval()
    inputs, samples = batch(seed=3, size=size)
    fresh = make_model()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        results = model.predict(inputs, samples)
        expected = fresh.eval().predict(inputs, batch(seed=3, size=size)[1])
    for result, other in zip(results, expected):
        assert result.pred_sem_seg.shape == size
        assert torch.equal(result.seg_logits.data, other.seg_logits.data)
    assert len({int(c) for c in results[0].pred_sem_seg.data.unique()}) > 1


def test_model_can_be_copied_after_a_training_step():
    model = make_model().train()
    model.loss(*batch())
    copy.deepcopy(model)

"""The OCR head and its auxiliary head, in mmseg's CascadeEncoderDecoder."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref

import golden
import numpy as np
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
    """Number of updates of the batch normalizations' statistics."""
    return {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, _BatchNorm)}


def test_logits_have_the_size_of_the_finest_stream():
    aux, ocr = make_head(OCRAuxHead), make_head(OCRHead, ocr_channels=8)
    for height, width in ((32, 32), (64, 96), (97, 161)):
        xs = streams(height, width)
        expected = (2, CLASSES, -(-height // 4), -(-width // 4))
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


def test_context_comes_before_the_pixels():
    """In the fusion layer, whose official weights have this order."""
    aux, ocr = make_head(OCRAuxHead), make_head(OCRHead, ocr_channels=8)
    seen = {}
    for name in ('bottleneck', 'object_attention', 'fuse'):
        module = getattr(ocr, name)
        module.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args, out)})
        )
    ocr(streams(), aux(streams()))
    (fused,), _ = seen['fuse']
    parts = [seen['object_attention'][1], seen['bottleneck'][1]]
    assert torch.equal(fused, torch.cat(parts, 1))
    assert not torch.equal(*parts)


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


def test_kept_logits_of_a_held_loss_are_used_once():
    """A second pass in the same step is a pass of its own, and updates the statistics."""
    aux = make_head(OCRAuxHead).train()
    xs = streams()
    losses = aux.loss(xs, batch()[1], {})
    before = counters(aux)
    assert torch.equal(aux(xs), losses.logits)
    assert counters(aux) == before
    aux(xs)
    assert counters(aux) == {count + 1 for count in before}


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


def train_alone(steps: int, call) -> nn.Module:
    """Train an auxiliary head on the same features in each step."""
    head = make_head(OCRAuxHead).train()
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        call(head)
        optimizer.step()
    return head


def test_auxiliary_head_is_an_ordinary_head_outside_the_cascade():
    """Loss, logits, or one after the other: each with a graph and an update of its own."""
    xs, (_, samples) = streams(), batch()

    def loss(head):
        head.losses = head.loss(xs, samples, {})  # held until the next step
        total(head.losses).backward()

    def logits(head):
        head.loss_by_feat(head(xs), samples)['loss_ce'].backward()

    def both(head):
        loss(head)
        head(xs).sum().backward()

    assert counters(train_alone(3, loss)) == counters(train_alone(3, logits)) == {3}
    assert counters(train_alone(3, both)) == {6}
    by_loss, by_logits = (dict(train_alone(3, f).named_parameters()) for f in (loss, logits))
    for name, parameter in by_loss.items():
        torch.testing.assert_close(parameter, by_logits[name])


@torch.no_grad()
def zero(head, xs):
    head.conv_seg.weight.zero_()


@torch.no_grad()
def load(head, xs):
    head.load_state_dict({k: v + 1 for k, v in head.state_dict().items()})


def replace(head, xs):
    head.conv_seg = copy.deepcopy(head.conv_seg)


@torch.no_grad()
def scale_features(head, xs):
    xs[2].mul_(2)


@pytest.mark.parametrize('change', [zero, load, replace, scale_features])
def test_logits_of_a_loss_that_is_held_are_those_of_now(change):
    head, (_, samples) = make_head(OCRAuxHead).train(), batch()
    xs = tuple(x.clone() for x in streams())
    losses = head.loss(xs, samples, {})
    change(head, xs)
    assert torch.equal(head(xs), copy.deepcopy(head)(xs))
    assert losses['loss_ce'].requires_grad


def test_logits_of_a_loss_are_of_its_features_and_modes():
    head, xs, (_, samples) = make_head(OCRAuxHead).train(), streams(), batch()
    losses = head.loss(xs, samples, {})
    with torch.no_grad():
        assert not head(xs).requires_grad
    losses = head.loss(xs, samples, {})
    with torch.autocast('cpu', torch.bfloat16):
        assert head(xs).dtype == torch.bfloat16
    with torch.no_grad():
        losses = head.loss(tuple(x.clone() for x in xs), samples, {})
        for seed in range(20):  # new tensors get the places in memory of old ones
            others = streams(seed=seed)
            assert torch.equal(head(others), copy.deepcopy(head)(others))
    assert losses


def test_nothing_is_kept_of_a_step():
    head, xs, (_, samples) = make_head(OCRAuxHead).train(), streams(), batch()
    before = set(vars(head))
    losses = head.loss(xs, samples, {})
    logits = weakref.ref(losses.logits)
    assert set(vars(head)) == before
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(twin(xs), losses.logits)
    del losses
    assert logits() is None
    losses = head.loss(xs, samples, {})
    total(losses).backward()
    assert losses.logits is None


@pytest.mark.parametrize('grad', [True, False])
def test_statistics_are_updated_once_in_every_mode(grad):
    model = make_model().train()
    inputs, samples = batch()
    with torch.set_grad_enabled(grad):
        model(inputs, samples, mode='loss')
        assert counters(model) == {1}
        model(inputs, samples, mode='tensor')
        assert counters(model) == {2}


def test_statistics_are_updated_once_when_compiled():
    model = make_model().train()
    compiled = torch.compile(model._decode_head_forward_train, backend='eager')
    compiled(streams(), batch()[1])
    assert counters(model.decode_head) == {1}


HEADS = {OCRAuxHead: {}, OCRHead: dict(ocr_channels=8)}


def run_heads(**options) -> list[nn.Module]:
    """Both heads with some options, after a step of training."""
    heads = [kind(**{**HEAD, **own, **options}).train() for kind, own in HEADS.items()]
    aux, ocr = heads
    xs = streams()
    ocr(xs, aux(xs)).sum().backward()
    return heads


@pytest.mark.parametrize(
    'options',
    [
        dict(norm_cfg=None),
        dict(act_cfg=None),
        dict(norm_cfg=None, act_cfg=None),
        dict(act_cfg=dict(type='PReLU')),
        dict(conv_cfg=dict(type='ConvWS')),
        dict(norm_cfg=dict(type='GN', num_groups=2)),
        dict(norm_cfg=dict(type='IN')),
        dict(norm_cfg=dict(type='BN', requires_grad=False)),
    ],
    ids=str,
)
def test_layers_are_those_that_stock_heads_take(options):
    for head in run_heads(**options):
        names = [type(m).__name__ for m in head.modules()]
        assert ('BatchNorm2d' in names) is (options.get('norm_cfg', dict(type='BN')) or {}).get(
            'type', ''
        ).startswith('BN')
        assert ('ReLU' in names) is ('act_cfg' not in options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(norm_cfg=dict(type='LN')), r"'LN'.* cannot normalize maps"),
        (dict(norm_cfg=dict(type='GN', num_groups=5)), 'num_groups=.*divides all channels'),
        (dict(norm_cfg='BN'), r"norm_cfg='BN': expected .*dict\(type='BN'\)"),
        (dict(act_cfg='ReLU'), "act_cfg='ReLU': expected a config"),
        (dict(conv_cfg={}), 'conv_cfg={}: expected a config'),
        (dict(groups=3), 'groups=3: expected a number that divides the 80 channels'),
        (dict(groups=0), 'groups=0: expected a number'),
        (dict(align_corners='no'), 'align_corners=.no.: expected True or False'),
        (dict(kernel_size=4), 'kernel_size=4: expected an odd number'),
        (dict(num_classes=1), 'use num_classes=2'),
        (dict(num_classes=2, out_channels=1, threshold=0.3), 'use num_classes=2'),
        (dict(in_index=3), 'in_index=3: .*lists of equal length'),
        (dict(in_index=(0, 1)), r'in_index=\(0, 1\): .*lists of equal length'),
        (dict(input_transform=None), 'one number each without input_transform'),
        (dict(input_transform='multiple_select'), "'multiple_select': choose 'resize_concat'"),
    ],
)
def test_impossible_options_are_named_with_a_remedy(options, message):
    for kind, own in HEADS.items():
        with pytest.raises(ValueError, match=message):
            kind(**{**HEAD, **own, **options})


def test_two_classes_take_two_channels_without_advice_of_mmseg():
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'For binary segmentation')
        for options in (dict(num_classes=2), dict(num_classes=2, out_channels=None)):
            assert [head.out_channels for head in run_heads(**options)] == [2, 2]


@pytest.mark.parametrize(
    'options',
    [
        dict(in_index=range(4)),
        dict(in_index=np.arange(4), in_channels=np.array(TINY['channels'])),
        dict(in_index=[-4, -3, np.int64(-2), -1]),
        dict(in_index=(-1,), in_channels=[32]),
        dict(in_index=-1, in_channels=32, input_transform=None),
        dict(in_index=np.int64(3), in_channels=np.int64(32), input_transform=None),
    ],
    ids=str,
)
def test_streams_are_chosen_by_indices_of_any_form(options):
    for head in run_heads(**options):
        with pytest.raises(ValueError, match='got 0 streams, but in_index is'):
            head(*[()] * (1 + isinstance(head, OCRHead)))


@pytest.mark.parametrize(('kind', 'layer'), [(OCRAuxHead, 'conv.0'), (OCRHead, 'bottleneck.0')])
def test_grouped_convolutions_of_ocr_v3(kind, layer):
    common = {**HEAD, 'channels': 16}
    plain, grouped = kind(**common), kind(**common, kernel_size=7, groups=16)
    assert plain.get_submodule(layer).weight.shape == (16, 80, 3, 3)
    assert grouped.get_submodule(layer).weight.shape == (16, 5, 7, 7)
    assert list(plain.state_dict()) == list(grouped.state_dict())
    xs = streams()
    previous = [torch.rand(2, CLASSES, *xs[0].shape[2:])] if kind is OCRHead else []
    assert grouped(xs, *previous).shape == (2, CLASSES, *xs[0].shape[2:])

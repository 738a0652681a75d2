"""The segmentation losses, against the values and gradients of the official code."""

from __future__ import annotations

import logging

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger

from mmhrformer import MODELS, OHEMCrossEntropyLoss, WeightedCrossEntropyLoss

CASES = {case['name']: case for case in golden.read_json('losses.json')['cases']}
DATA = golden.load('losses.npz')
LOSSES = [WeightedCrossEntropyLoss, OHEMCrossEntropyLoss]
IGNORED = -1  # in the golden labels


def losses_of(case: dict) -> tuple[OHEMCrossEntropyLoss, WeightedCrossEntropyLoss]:
    """The losses of the two heads with the settings of a case."""
    ohem = dict(thresh=case['ohem_thresh'], min_kept=case['ohem_minkeep'])
    return (
        OHEMCrossEntropyLoss(class_weight=case['ce_weight'], **ohem),
        WeightedCrossEntropyLoss(
            class_weight=case['ce_weight'], loss_weight=case['aux_weight'] * case['seg_weight']
        ),
    )


def inputs_of(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the two heads, in float64, and labels."""
    logits = (
        torch.from_numpy(DATA[f'{k}_logits']).double().requires_grad_() for k in ('seg', 'aux')
    )
    label = torch.from_numpy(DATA[f'label_{case["labels"]}']).long()
    return *logits, label


@pytest.mark.parametrize('name', [name for name in CASES if 'all_ignored' not in name])
def test_values_and_gradients_are_the_official_ones(name):
    case = CASES[name]
    seg, aux, label = inputs_of(case)
    ohem, ce = losses_of(case)
    seg_loss = ohem(seg, label, ignore_index=IGNORED)
    aux_loss = ce(aux, label, ignore_index=IGNORED)
    (seg_loss + aux_loss).backward()
    pixels = seg.grad.abs().sum(1) > 0
    assert pixels.sum() == case['n_pixels_with_seg_gradient_fp64']
    for ours, official in [
        (seg_loss.item(), case['seg_ohem_fp64']),
        (aux_loss.item(), case['aux_weight'] * case['aux_ce_fp64']),
        ((seg_loss + aux_loss).item(), case['total_fp64']),
        (seg.grad.norm().item(), case['grad_seg_l2_fp64']),
        (aux.grad.norm().item(), case['grad_aux_l2_fp64']),
    ]:
        assert ours == pytest.approx(official, abs=1e-9, rel=0)


@pytest.mark.parametrize('name', ['cityscapes_official', 'adecoco_official'])
def test_plain_cross_entropy_on_both_heads(name):
    """A batch as in training on PASCAL-Context."""
    case = CASES[name]
    seg, aux, label = inputs_of(case)
    _, ce = losses_of(case)
    plain = WeightedCrossEntropyLoss(class_weight=case['ce_weight'])
    value = plain(seg, label, ignore_index=IGNORED)
    assert value.item() == pytest.approx(case['fs_ce_seg_fp64'], abs=1e-9, rel=0)
    value += ce(aux, label, ignore_index=IGNORED)
    assert value.item() == pytest.approx(case['fs_auxce_total_fp64'], abs=1e-9, rel=0)


@pytest.fixture
def messages():
    """Messages logged during a test."""
    logger, handler, seen = MMLogger.get_current_instance(), logging.Handler(logging.INFO), []
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def test_batch_without_labels_costs_nothing_and_is_mentioned_once(messages):
    seg, aux, label = inputs_of(CASES['t09_k100_all_ignored'])
    losses = losses_of(CASES['t09_k100_all_ignored'])
    for _ in range(3):
        for loss, logits in zip(losses, (seg, aux)):
            value = loss(logits, label, ignore_index=IGNORED)
            value.backward()
            assert value == 0
            assert torch.equal(logits.grad, torch.zeros_like(logits))
    assert len(messages) == 2  # one of each loss
    assert 'OHEMCrossEntropyLoss: every pixel of a batch is ignored' in messages[0]


@pytest.mark.parametrize(('kind', 'options'), [(LOSSES[0], {}), (LOSSES[1], dict(thresh=1.0))])
def test_label_255_is_ignored_also_with_class_weights(kind, options):
    """mmseg's own loss looks up the weight of class 255 there."""
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    label[:, 1] = 255
    loss = kind(class_weight=[1.0, 2.0, 3.0], **options)
    rest = [0, 2, 3]
    torch.testing.assert_close(loss(logits, label), loss(logits[:, :, rest], label[:, rest]))


def test_class_weights_scale_the_mean_or_the_pixels():
    logits, label = torch.zeros(1, 2, 1, 4), torch.tensor([[[0, 1, 1, 1]]])
    log2 = torch.tensor(2.0).log()
    weights = [1.0, 5.0]
    torch.testing.assert_close(WeightedCrossEntropyLoss(weights)(logits, label), log2)
    torch.testing.assert_close(OHEMCrossEntropyLoss(class_weight=weights)(logits, label), log2 * 4)


def test_hardest_pixels_of_the_whole_batch_are_kept():
    """The loss is the mean of the ``min_kept`` largest, wherever in the batch they are."""
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    pixels = F.cross_entropy(logits, label, reduction='none').flatten()
    loss = OHEMCrossEntropyLoss(thresh=1e-6, min_kept=7)(logits, label)
    torch.testing.assert_close(loss, pixels.topk(7).values.mean())


def test_easy_pixels_do_not_count():
    logits = torch.tensor([[4.0, -4.0], [0.0, 0.0], [4.0, -4.0]]).T.view(1, 2, 1, 3)
    label = torch.tensor([[[0, 0, 1]]])
    pixels = F.cross_entropy(logits, label, reduction='none').flatten()
    loss = OHEMCrossEntropyLoss(thresh=0.9, min_kept=1)(logits, label)
    torch.testing.assert_close(loss, pixels[1:].mean())


@pytest.mark.parametrize('kind', LOSSES)
def test_labels_are_not_changed(kind):
    logits, label = torch.randn(1, 3, 2, 2), torch.tensor([[[255, 0], [1, 2]]])
    before = label.clone()
    kind()(logits, label)
    assert torch.equal(label, before)


@pytest.mark.parametrize('kind', LOSSES)
def test_weight_and_name_of_the_loss(kind):
    logits, label = torch.randn(1, 3, 2, 2), torch.tensor([[[0, 0], [1, 2]]])
    loss = MODELS.build(dict(type=f'mmhrformer.{kind.__name__}', loss_weight=0.4))
    torch.testing.assert_close(loss(logits, label), 0.4 * kind()(logits, label))
    assert kind().loss_name == ('loss_ohem' if kind is OHEMCrossEntropyLoss else 'loss_ce')
    assert kind(loss_name='loss_mine').loss_name == 'loss_mine'
    assert not kind(class_weight=[1.0, 2.0]).state_dict()


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of 3 classes and labels, some of them ignored."""
    torch.manual_seed(0)
    scores, label = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    label[:, 1] = 255
    return scores, label


STOCK_CALLS = [
    dict(),
    dict(reduction_override='none'),
    dict(reduction_override='sum'),
    dict(avg_factor=7),
    dict(avg_factor=torch.tensor(3.5)),
    dict(avg_factor=7, reduction_override='none'),
    dict(weight=torch.rand(2, 4, 5)),
    dict(weight=torch.rand(2, 4, 5), avg_factor=0.5),
    dict(ignore_index=2),
]


@pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore``')
@pytest.mark.parametrize('options', STOCK_CALLS, ids=lambda o: ' '.join(o) or 'plain')
@pytest.mark.parametrize('avg_non_ignore', [True, False])
def test_calls_are_those_of_the_stock_loss(options, avg_non_ignore):
    stock = pytest.importorskip('mmseg.models.losses').CrossEntropyLoss
    scores, label = scene()
    label[label == 255] = options.get('ignore_index', 255)
    made = dict(avg_non_ignore=avg_non_ignore, loss_weight=0.3)
    call = dict(ignore_index=255) | options
    expected = stock(**made)(scores, label, **call)
    torch.testing.assert_close(WeightedCrossEntropyLoss(**made)(scores, label, **call), expected)
    order = ('weight', 'avg_factor', 'reduction_override', 'ignore_index')
    by_position = WeightedCrossEntropyLoss(**made)(scores, label, *map(call.get, order))
    torch.testing.assert_close(by_position, expected)
    # With class weights the stock loss needs labels that are all classes.
    made['class_weight'] = [1.0, 0.5, 2.0]
    label = label.masked_fill(label > 2, 0)
    expected = stock(**made)(scores, label, **options)
    torch.testing.assert_close(WeightedCrossEntropyLoss(**made)(scores, label, **options), expected)


def test_ohem_reduces_the_pixels_that_it_keeps():
    scores, label = scene()
    loss = OHEMCrossEntropyLoss(thresh=0.2, min_kept=5)
    pixels = loss(scores, label, reduction_override='none')
    assert pixels.shape == label.shape
    kept = pixels[pixels > 0]
    assert 5 <= len(kept) < (label != 255).sum()
    torch.testing.assert_close(loss(scores, label), kept.mean())
    torch.testing.assert_close(loss(scores, label, reduction_override='sum'), kept.sum())
    torch.testing.assert_close(loss(scores, label, avg_factor=10), kept.sum() / 10)
    doubled = loss(scores, label, weight=torch.full(label.shape, 2.0))
    torch.testing.assert_close(doubled, 2 * kept.mean())


def test_pixel_sampler_of_mmseg_finds_the_hardest_pixels():
    """The sampler requests the losses of single pixels, then passes weights."""
    sampling = pytest.importorskip('mmseg.structures.sampler')
    scores, label = scene()
    loss = WeightedCrossEntropyLoss([1.0, 3.0, 1.0])
    context = torch.nn.Module()
    context.loss_decode, context.ignore_index = loss, 255
    weight = sampling.OHEMPixelSampler(context, min_kept=4).sample(scores, label[:, None])
    hardest = loss(scores, label, reduction_override='none').flatten().topk(8).values
    value = loss(scores, label, weight=weight, reduction_override='sum')
    torch.testing.assert_close(value, hardest.sum())


@pytest.mark.parametrize('kind', LOSSES)
def test_nothing_is_ignored_without_an_ignore_index(kind):
    scores, label = scene()
    label = label.masked_fill(label == 255, 1)
    loss = kind()
    assert loss(scores, label, ignore_index=None) == loss(scores, label)
    label[0, 0, 0] = 255
    with pytest.raises(ValueError, match=r'labels \[255\]'):
        loss(scores, label, ignore_index=None)


@pytest.mark.parametrize('kind', LOSSES)
def test_labels_that_are_no_class_are_named(kind):
    scores, label = scene()
    classes = scores.shape[1]
    for wrong in (-1, classes):
        label[0, 0, 0] = wrong
        with pytest.raises(ValueError, match=rf'labels \[{wrong}\].*0 to {classes - 1}'):
            kind()(scores, label)


WEIGHTS = [1.0, 0.5, 2.0]


@pytest.mark.parametrize('kind', LOSSES)
def test_class_weights_of_any_form(kind, tmp_path):
    np.save(tmp_path / 'a.npy', np.array(WEIGHTS))
    (tmp_path / 'a.json').write_text(str(WEIGHTS))
    (tmp_path / 'a.yml').write_text(str(WEIGHTS))
    scores, label = scene()
    expected = kind(class_weight=WEIGHTS)(scores, label)
    files = [tmp_path / 'a.npy', str(tmp_path / 'a.json'), str(tmp_path / 'a.yml')]
    arrays = [np.array(WEIGHTS), np.array(WEIGHTS, np.float32), torch.tensor(WEIGHTS)]
    for form in (tuple(WEIGHTS), *arrays, *files):
        assert kind(class_weight=form)(scores, label) == expected


def test_class_weights_that_are_none_are_named(tmp_path):
    (tmp_path / 'a.json').write_text('{"road": 1}')
    for form, words in (
        (tmp_path / 'a.json', r"a\.json'.*read as \{'road': 1\}: expected a non-negative number"),
        (np.array([[1.0, 2.0]]), 'class_weight=array'),
        (torch.tensor([1.0, float('nan')]), 'class_weight=tensor'),
        (tmp_path / 'a.txt', r'a\.txt.*\.npy'),
    ):
        with pytest.raises(ValueError, match=words):
            WeightedCrossEntropyLoss(form)
    with pytest.raises(FileNotFoundError, match=r'b\.npy'):
        WeightedCrossEntropyLoss(tmp_path / 'b.npy')


@pytest.mark.parametrize('kind', LOSSES)
def test_calls_that_cannot_be_are_named_with_a_remedy(kind):
    scores, label = scene()
    for message, options in (
        ('reduction_override=.max.: choose', dict(reduction_override='max')),
        ('avg_factor=3: remove it', dict(avg_factor=3, reduction_override='sum')),
        (r'weights of shape \(2, 1, 4, 5\)', dict(weight=torch.ones(2, 1, 4, 5))),
    ):
        with pytest.raises(ValueError, match=message):
            kind()(scores, label, **options)
    with pytest.raises(ValueError, match=r'one channel.*num_classes=2.*use_sigmoid=True'):
        kind()(scores[:, :1], label.clamp(max=0))
    with pytest.raises(ValueError, match=r'reduction=.max.: choose'):
        kind(reduction='max')
    with pytest.raises(ValueError, match=r'avg_non_ignore=.no.: expected True or False'):
        WeightedCrossEntropyLoss(avg_non_ignore='no')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', LOSSES)
def test_sums_of_half_precision_do_not_overflow(kind, dtype):
    """Outside of autocast, as in training by DeepSpeed: float16 has no numbers above 65504."""
    label = torch.randint(0, 3, (2, 256, 256), generator=torch.Generator().manual_seed(0))
    scores = (F.one_hot(label, 3).permute(0, 3, 1, 2) * 2).to(dtype).requires_grad_()
    loss = kind()(scores, label)
    torch.testing.assert_close(loss, kind()(scores.float(), label))
    (grad,) = torch.autograd.grad(loss * 1024, scores)
    assert grad.abs().sum() > 0


def test_labels_may_be_transposed():
    scores, label = scene()
    turned = label.transpose(1, 2).contiguous().transpose(1, 2)
    loss = OHEMCrossEntropyLoss(thresh=0.3, min_kept=5)
    assert loss(scores, turned) == loss(scores, label)


def test_impossible_settings_are_named_with_a_remedy():
    for options, message in (
        (dict(thresh=0), r'thresh=0: expected a probability in \(0, 1\]'),
        (dict(thresh=1.5), r'thresh=1.5: expected a probability in \(0, 1\]'),
        (dict(min_kept=0), 'min_kept=0: expected a positive number of pixels'),
    ):
        with pytest.raises(ValueError, match=message):
            OHEMCrossEntropyLoss(**options)

"""The segmentation losses, against the values and gradients of the official code."""

from __future__ import annotations

import logging

import golden
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
    """As in training on PASCAL-Context."""
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
    """What is logged during a test."""
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
    """Where mmseg's own loss looks the weight of class 255 up."""
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
    assert (
        kind().loss_name
        == {
            'WeightedCrossEntropyLoss': 'loss_ce',
            'OHEMCrossEntropyLoss': 'loss_ohem',
        }[kind.__name__]
    )
    assert kind(loss_name='loss_mine').loss_name == 'loss_mine'
    assert not kind(class_weight=[1.0, 2.0]).state_dict()


@pytest.mark.parametrize('kind', LOSSES)
def test_class_weights_must_be_as_many_as_classes(kind):
    with pytest.raises(ValueError, match='class_weight has 2 numbers, the head 3 classes'):
        kind(class_weight=[1.0, 2.0])(torch.randn(1, 3, 2, 2), torch.zeros(1, 2, 2).long())


@pytest.mark.parametrize('kind', LOSSES)
def test_pixel_samplers_are_refused(kind):
    with pytest.raises(ValueError, match="remove the decode head's sampler"):
        kind()(torch.randn(1, 3, 2, 2), torch.zeros(1, 2, 2).long(), weight=torch.ones(1, 2, 2))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(thresh=0), r'thresh=0: choose a probability in \(0, 1\]'),
        (dict(thresh=1.5), r'thresh=1.5: choose a probability in \(0, 1\]'),
        (dict(min_kept=0), 'min_kept=0: choose a number of pixels of at least 1'),
    ],
)
def test_impossible_settings_are_named_with_a_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        OHEMCrossEntropyLoss(**options)

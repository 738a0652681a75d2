"""Learning rates, step by step, against those of the official recipes."""

from __future__ import annotations

import math

import golden
import pytest
import torch
from mmengine.registry import PARAM_SCHEDULERS

from mmhrformer.engine import WarmupCosineLR

SCHEDULE = golden.read_json('schedule.json')
IMAGENET_SAMPLES = SCHEDULE['classification']['lr']['samples_update_lr']
IMAGENET = dict(warmup=20, start_factor=1e-3, end=300, end_factor=1e-2)
EPOCH = 1251  # iterations per epoch on ImageNet

pytestmark = pytest.mark.filterwarnings('ignore:Detected call of `scheduler.step')


def make_optimizer(*rates: float) -> torch.optim.Optimizer:
    """An optimizer that has nothing to do, since only its learning rates matter."""
    groups = [dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=lr) for lr in rates]
    return torch.optim.SGD(groups, lr=1)


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group['lr'] for group in optimizer.param_groups]


@pytest.mark.parametrize(('step', 'rate'), IMAGENET_SAMPLES)
def test_warmup_and_cosine_are_those_of_the_official_classification(step, rate):
    optimizer = make_optimizer(1e-3, 5e-4)
    scheduler = WarmupCosineLR.build_iter_from_epoch(optimizer, epoch_length=EPOCH, **IMAGENET)
    assert not scheduler.by_epoch
    scheduler.last_step = step - 1
    scheduler.step()
    assert learning_rates(optimizer) == pytest.approx([rate, rate / 2], rel=1e-8, abs=0)
    assert scheduler.get_last_value() == learning_rates(optimizer)


def test_schedule_can_count_epochs():
    optimizer = make_optimizer(1e-3)
    scheduler = WarmupCosineLR(optimizer, **IMAGENET)
    rates = []
    for _ in range(300):
        rates += learning_rates(optimizer)
        scheduler.step()
    samples = {step // EPOCH: rate for step, rate in IMAGENET_SAMPLES if step % EPOCH == 0}
    assert set(samples) == {0, 10, 20, 75, 150, 280}
    assert {epoch: rates[epoch] for epoch in samples} == pytest.approx(samples, rel=1e-8, abs=0)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_warmup_may_be_a_part_of_an_epoch():
    scheduler = WarmupCosineLR.build_iter_from_epoch(
        make_optimizer(1.0), warmup=0.25, start_factor=0.1, end=2, epoch_length=10
    )
    assert (scheduler.warmup, scheduler.end) == (2, 20)


def rates_of(schedules: list[dict], steps: int, rate: float = 1.0, per_epoch: int = 3):
    """Learning rates, step by step, as mmengine's runner builds and steps schedules."""
    optimizer = make_optimizer(rate)
    built = [
        PARAM_SCHEDULERS.build(
            cfg, default_args=dict(optimizer=optimizer, epoch_length=per_epoch, end=steps)
        )
        for cfg in schedules
    ]
    rates = []
    for _ in range(steps):
        rates += learning_rates(optimizer)
        for schedule in built:
            schedule.step()
    return rates


def by_hand(step: int, warmup: int, begin: int, end: int, start=0.1, last=0.02) -> float:
    if not begin <= step < end:
        return by_hand(end - 1, warmup, begin, end, start, last) if step >= end else 1.0
    step -= begin
    if step < warmup:
        return start + (1 - start) * step / warmup
    return last + (1 - last) * (1 + math.cos(math.pi * step / (end - begin))) / 2


@pytest.mark.parametrize(
    ('options', 'unit'),
    [
        (dict(begin=2, end=12), 1),
        (dict(begin=2, end=12, by_epoch=False, verbose=True), 1),
        (dict(begin=2, end=12, convert_to_iter_based=True), 3),
        (dict(begin=1), 1),
        (dict(begin=0, end=9), 1),
        (dict(convert_to_iter_based=True, end=4), 3),
    ],
)
def test_begin_and_end_are_where_the_config_says(options, unit):
    cfg = dict(type='mmhrformer.WarmupCosineLR', warmup=3, start_factor=0.1, end_factor=0.02)
    rates = rates_of([{**cfg, **options}], steps=40)
    begin, end = options.get('begin', 0) * unit, options.get('end', 40) * unit
    expected = [by_hand(step, 3 * unit, begin, end) for step in range(40)]
    assert rates == pytest.approx(expected, rel=1e-9)


def test_without_warmup_it_is_the_cosine_of_mmengine():
    ours = dict(type='mmhrformer.WarmupCosineLR', warmup=0, start_factor=1, end_factor=0.02)
    stock = dict(type='CosineAnnealingLR', eta_min_ratio=0.02)
    for options in (dict(begin=4, end=20), dict(begin=2, end=6, convert_to_iter_based=True)):
        one, other = (rates_of([{**cfg, **options}], steps=25) for cfg in (ours, stock))
        assert one == pytest.approx(other, rel=1e-9)


def test_schedules_follow_one_another():
    schedules = [
        dict(type='LinearLR', start_factor=0.1, end=6),
        dict(type='mmhrformer.WarmupCosineLR', warmup=0, start_factor=1, begin=5, end=15),
        dict(type='mmhrformer.WarmupCosineLR', warmup=2, start_factor=0.5, begin=15, end=25),
        dict(type='MultiStepLR', milestones=[27], gamma=0.1),
    ]
    rates = rates_of(schedules, steps=30)
    assert rates[:6] == pytest.approx([0.1 + 0.9 * step / 5 for step in range(6)])
    assert rates[5:15] == pytest.approx([by_hand(s, 0, 5, 15, last=0) for s in range(5, 15)])
    assert rates[15:25] == pytest.approx([by_hand(s, 2, 15, 25, 0.5, 0) for s in range(15, 25)])
    assert rates[25:27] == [rates[24]] * 2
    assert rates[27:] == pytest.approx([rates[24] * 0.1] * 3)


def test_last_step_resumes_without_a_state():
    optimizer = make_optimizer(0.3)
    optimizer.param_groups[0]['initial_lr'] = 1.0
    scheduler = WarmupCosineLR(
        optimizer, warmup=4, start_factor=0.1, end_factor=0.02, end=20, last_step=6
    )
    assert learning_rates(optimizer) == pytest.approx([by_hand(7, 4, 0, 20)])
    scheduler.step()
    assert learning_rates(optimizer) == pytest.approx([by_hand(8, 4, 0, 20)])


@pytest.mark.parametrize('begin', [0, 3])
def test_schedule_goes_on_where_it_was_resumed(begin):
    first, second = make_optimizer(1e-3), make_optimizer(1e-3)
    scheduler = WarmupCosineLR(first, warmup=4, start_factor=0.1, begin=begin, end=20)
    for _ in range(7):
        scheduler.step()
    resumed = WarmupCosineLR(second, warmup=1, start_factor=0.5, end=2)
    resumed.load_state_dict(scheduler.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(5):
        scheduler.step()
        resumed.step()
        assert learning_rates(second) == learning_rates(first)


@pytest.mark.parametrize('warmup', [-1, 20, 30])
def test_warmup_must_fit_into_the_training(warmup):
    with pytest.raises(ValueError, match=f'warmup={warmup}.*less than end=20'):
        WarmupCosineLR(make_optimizer(1.0), warmup=warmup, start_factor=0.1, end=20)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(begin=5, end=20, warmup=15), 'warmup=15.*less than end=20 - begin=5'),
        (dict(begin=20, end=20, warmup=1), 'begin=20, end=20'),
        (dict(begin=-1, end=20, warmup=1), 'begin=-1'),
        (dict(warmup=1), 'expected 0 <= begin < end'),
    ],
)
def test_begin_and_end_must_leave_room(options, message):
    with pytest.raises(ValueError, match=message):
        WarmupCosineLR(make_optimizer(1.0), start_factor=0.1, **options)
    with pytest.raises(ValueError, match=r'begin|warmup'):
        WarmupCosineLR.build_iter_from_epoch(
            make_optimizer(1.0), start_factor=0.1, epoch_length=10, **options
        )


@pytest.mark.parametrize('options', [dict(), dict(epoch_length=10, by_epoch=False)])
def test_conversion_to_iterations_needs_epochs(options):
    with pytest.raises(ValueError, match='convert_to_iter_based'):
        WarmupCosineLR.build_iter_from_epoch(make_optimizer(1.0), **IMAGENET, **options)


@pytest.mark.parametrize(
    'factors',
    [dict(start_factor=-1), dict(start_factor=10), dict(start_factor='x'), dict(end_factor=2)],
    ids=str,
)
def test_factors_that_are_none_are_refused(factors):
    name, value = next(iter(factors.items()))
    with pytest.raises(ValueError, match=rf'{name}={value!r}: expected a number from 0 to 1'):
        WarmupCosineLR(make_optimizer(1.0), **{**IMAGENET, **factors})

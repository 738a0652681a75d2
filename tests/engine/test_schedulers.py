"""Learning rates, step by step, against those of the official recipes."""

from __future__ import annotations

import golden
import pytest
import torch

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


def test_schedule_goes_on_where_it_was_resumed():
    first, second = make_optimizer(1e-3), make_optimizer(1e-3)
    scheduler = WarmupCosineLR(first, warmup=4, start_factor=0.1, end=20)
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


@pytest.mark.parametrize('options', [dict(), dict(epoch_length=10, by_epoch=False)])
def test_conversion_to_iterations_needs_epochs(options):
    with pytest.raises(ValueError, match='convert_to_iter_based'):
        WarmupCosineLR.build_iter_from_epoch(make_optimizer(1.0), **IMAGENET, **options)

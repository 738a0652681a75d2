"""Resumed runs draw the random numbers of a run that was left alone."""

from __future__ import annotations

import random
from types import SimpleNamespace

import golden
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import HOOKS
from small_runs import NoisyNumbers, log, train
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from mmhrformer.engine import seed_hook
from mmhrformer.engine.seed_hook import _seed_worker

pytestmark = pytest.mark.once


@pytest.mark.parametrize(('stop', 'workers'), [(1, 2), (6, 0), (9, 2)])
def test_resumed_epochs_are_those_of_a_run_left_alone(tmp_path, stop, workers):
    whole = train(tmp_path / 'whole', workers=workers)
    assert len(set(whole.values())) == 16  # nothing is drawn twice
    train(tmp_path / 'cut', stop, workers=workers)
    resumed = train(tmp_path / 'cut', workers=workers, resume=True)
    assert sorted(resumed) == list(range(stop // 4 * 4, 16))
    assert resumed == {step: whole[step] for step in resumed}


def test_resumed_iterations_are_those_of_a_run_left_alone(tmp_path):
    whole = train(tmp_path / 'whole', workers=2, by_epoch=False)
    assert len(set(whole.values())) == 16
    train(tmp_path / 'cut', 10, workers=2, by_epoch=False)
    resumed = train(tmp_path / 'cut', workers=2, by_epoch=False, resume=True)
    assert sorted(resumed) == list(range(8, 16))
    assert resumed == {step: whole[step] for step in resumed}


def test_resuming_needs_no_seed_in_the_config(tmp_path):
    """The one that was drawn is in the checkpoint, and then decides the order of the data, too."""
    cut = train(tmp_path / 'cut', 9, randomness=dict(seed=None))
    seed = torch.load(tmp_path / 'cut/epoch_2.pth')['meta']['seed']
    whole = train(tmp_path / 'whole', randomness=dict(seed=seed))
    resumed = train(tmp_path / 'cut', randomness=dict(seed=None), resume=True)
    assert {**cut, **resumed} == whole


def test_workers_of_a_loader_keep_their_own_start():
    """mmengine's worker_init_fn, or one of the config, is called as before."""
    started = []
    _seed_worker((3, 1, 0), started.append, 5)
    drawn = np.random.rand()
    assert started == [5]
    _seed_worker((3, 1, 0), None, 5)
    assert np.random.rand() == drawn
    _seed_worker((3, 2, 0), None, 5)
    assert np.random.rand() != drawn


def test_workers_are_seeded_by_epoch_and_rank(monkeypatch):
    """And they are still started as the config says."""
    started, drawn = [], set()
    loader = DataLoader(NoisyNumbers(), num_workers=2, worker_init_fn=started.append)
    loop = SimpleNamespace(dataloader=loader)
    for rank, epoch in ((0, 0), (0, 1), (1, 1), (1, 2)):
        monkeypatch.setattr(seed_hook, 'get_rank', lambda rank=rank: rank)
        runner = SimpleNamespace(train_loop=loop, cfg={}, seed=3, epoch=epoch, iter=0)
        seed_hook.ResumableSeedHook().before_train_epoch(runner)
        for worker in range(2):
            loader.worker_init_fn(worker)
            drawn.add(np.random.rand())
    assert started == [0, 1] * 4
    assert len(drawn) == 8


@pytest.mark.parametrize('moment', ['before_train_epoch', 'before_train_iter'])
def test_processes_draw_other_numbers(moment, monkeypatch):
    """Otherwise all GPUs would drop the same paths, and mix their images by the same ratio."""
    runner = SimpleNamespace(
        train_loop=SimpleNamespace(dataloader=None), cfg={}, seed=3, epoch=1, iter=5
    )
    drawn = []
    for rank in (0, 1, 1):
        monkeypatch.setattr(seed_hook, 'get_rank', lambda rank=rank: rank)
        arguments = [0] * (moment == 'before_train_iter')
        getattr(seed_hook.ResumableSeedHook(), moment)(runner, *arguments)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    first, *second = drawn
    assert second[0] == second[1]
    assert not set(first) & set(second[0])


class NotALoader:
    """A loader like DALI's or WebLoader, with a length, a dataset and batches."""

    dataset = NoisyNumbers()

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        return (dict(inputs=[torch.rand(1), torch.rand(1)]) for _ in range(4))


class Stream(IterableDataset):
    def __len__(self) -> int:
        return 8

    def __iter__(self):
        return (NoisyNumbers()[index] for index in range(8))


class Batches:
    """A batch sampler that has no sampler, and counts epochs itself."""

    epoch = None

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        return iter(torch.randperm(8).reshape(4, 2).tolist())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def loader_of(kind: str):
    """A loader, and what is said of it."""
    options = dict(collate_fn=pseudo_collate, batch_size=2)
    if kind == 'no DataLoader':
        return NotALoader(), "is a NotALoader, not torch's DataLoader"
    if kind == 'iterable':
        return DataLoader(Stream(), num_workers=1, **options), ''
    if kind == 'batch sampler':
        loader = DataLoader(NoisyNumbers(), batch_sampler=Batches(), collate_fn=pseudo_collate)
        return loader, ''
    if kind == 'no batches':
        return DataLoader(ConcatDataset([Batch(), Batch()]), batch_size=None, shuffle=True), ''
    if kind == 'subset':
        return DataLoader(Subset(NoisyNumbers(), range(4)), shuffle=True, **options), ''
    generator = torch.Generator()
    return DataLoader(
        NoisyNumbers(), shuffle=True, generator=generator, **options
    ), 'its own generator'


class Batch(NoisyNumbers):
    """Whole batches."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, list[torch.Tensor]]:
        return dict(inputs=[super().__getitem__(index)['inputs']] * 2)


@pytest.mark.parametrize(
    'kind', ['no DataLoader', 'iterable', 'batch sampler', 'no batches', 'subset', 'generator']
)
def test_loaders_of_all_kinds(tmp_path, kind):
    """They run and resume exactly; what does not is logged once."""
    loader, said = loader_of(kind)
    whole = train(tmp_path / 'whole', train_dataloader=loader)
    train(tmp_path / 'cut', len(loader) + 1, train_dataloader=loader_of(kind)[0])
    resumed = train(tmp_path / 'cut', train_dataloader=loader_of(kind)[0], resume=True)
    assert min(resumed) == len(loader)
    if kind != 'generator':
        assert resumed == {step: whole[step] for step in resumed}
    told = log(tmp_path / 'whole').count('a resumed run may see other data')
    assert told == bool(said)
    assert said in log(tmp_path / 'whole')
    if kind == 'batch sampler':
        assert loader.batch_sampler.epoch == 3


def test_loaders_of_all_kinds_by_iterations(tmp_path):
    for kind in ('no DataLoader', 'subset'):
        work = tmp_path / kind.replace(' ', '_')
        train(work, 6, by_epoch=False, train_dataloader=loader_of(kind)[0], hook=dict(interval=2))


@pytest.mark.parametrize('task', ['cls', 'pose', 'seg'])
def test_configs_use_both_hooks(task):
    hooks = Config.fromfile(golden.CONFIGS / f'_base_/runtime/{task}.py').default_hooks
    assert hooks.checkpoint.type == 'mmhrformer.SafeCheckpointHook'
    assert hooks.sampler_seed.type == 'mmhrformer.ResumableSeedHook'
    for cfg in hooks.values():
        if cfg.type.startswith('mmhrformer.'):
            assert type(HOOKS.build(cfg)).__name__ == cfg.type.removeprefix('mmhrformer.')

"""Runs of 16 iterations: a model of one layer or a micro HRFormer, eight numbers, our hooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmhrformer import HRFormer

MICRO = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)


class NoisyNumbers(Dataset):
    """Eight numbers with noise from a generator, as an augmentation would add it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(inputs=torch.tensor([index + np.random.rand()], dtype=torch.float))


class Dropping(BaseModel):
    """A layer behind a dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 16)

    def forward(self, inputs, mode='tensor'):
        inputs = torch.stack(inputs)
        if mode == 'predict':
            return [dict()]
        return dict(loss=nn.functional.dropout(self.layer(inputs)).square().mean())


class Reading(BaseModel):
    """An HRFormer that is to read numbers off a pattern."""

    def __init__(self, norm: str = 'BN') -> None:
        super().__init__()
        torch.manual_seed(0)
        options = dict(out_indices=(0,), drop_path_rate=0.2, norm_cfg=dict(type=norm))
        self.backbone = HRFormer(arch=MICRO, **options)
        self.head = nn.Linear(8, 1)

    def forward(self, inputs, mode='tensor'):
        numbers = torch.stack(inputs) / 8  # (B, 1)
        waves = torch.linspace(0, 9, 3 * 64 * 64, device=numbers.device).view(3, 64, 64)
        maps = self.backbone(torch.sin(numbers[..., None, None] * waves))[0]  # (B, 8, 16, 16)
        return dict(loss=(self.head(maps.mean((2, 3))) - numbers).square().mean())


class Losses(Hook):
    """Keeps the losses and stops, as by a kill, before a given iteration is done."""

    def __init__(self, stop: int | None) -> None:
        self.stop = stop
        self.losses: dict[int, float] = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter == self.stop:
            raise KeyboardInterrupt
        self.losses[runner.iter] = outputs['loss'].item()


class GivenScores(Evaluator):
    """An evaluator whose results are known in advance."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__([])
        self.scores = iter(scores)

    def evaluate(self, size: int) -> dict[str, float]:
        return dict(score=next(self.scores))


def make_runner(work: Path, stop: int | None = None, **options) -> Runner:
    """A run of 4 epochs, or 16 iterations, of 4 iterations each.

    Args:
        work (Path): Its folder.
        stop (int, optional): The iteration before whose end it stops.
        **options: Arguments of the runner, and ``kind`` (its class), ``by_epoch``, ``length`` (of
            ``train_cfg``), ``hook`` (of the checkpoints), ``workers`` (of the loader).

    Returns:
        Runner: The run.
    """
    by_epoch = options.pop('by_epoch', True)
    workers = options.pop('workers', 0)
    hook = options.pop('hook', {})
    custom_hooks = [Losses(stop), *options.pop('custom_hooks', [])]
    length = dict(max_epochs=4) if by_epoch else dict(max_iters=16, val_interval=4)
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    if 'val_evaluator' in options:
        options['val_dataloader'] = dict(
            batch_size=8, sampler=dict(type='DefaultSampler', shuffle=False), dataset=NoisyNumbers()
        )
        options['val_cfg'] = dict()
    return options.pop('kind', Runner)(
        model=options.pop('model', None) or Dropping(),
        work_dir=str(work),
        train_dataloader=options.pop('train_dataloader', None)
        or dict(
            batch_size=2,
            num_workers=workers,
            persistent_workers=workers > 0,
            sampler=dict(type=sampler, shuffle=True),
            dataset=NoisyNumbers(),
        ),
        train_cfg=dict(by_epoch=by_epoch, **{**length, **options.pop('length', {})}),
        optim_wrapper=options.pop('optim_wrapper', None)
        or dict(optimizer=dict(type='SGD', lr=1e-3, momentum=0.9)),
        default_hooks=dict(
            checkpoint=dict(
                type='mmhrformer.SafeCheckpointHook',
                **{'interval': 1 if by_epoch else 4, 'by_epoch': by_epoch, **hook},
            ),
            sampler_seed=dict(type='mmhrformer.ResumableSeedHook'),
        ),
        custom_hooks=custom_hooks,
        randomness=options.pop('randomness', dict(seed=3)),
        experiment_name=f'{work.name}{np.random.SeedSequence().entropy}',
        **options,
    )


def amp(dtype: str, on_cuda: bool, **options) -> dict:
    """AdamW with mmengine's half precision, which takes GPUs only."""
    if on_cuda:
        options.update(type='AmpOptimWrapper', dtype=dtype, loss_scale='dynamic')
    return dict(optimizer=dict(type='AdamW', lr=1e-3), **options)


def losses(runner: Runner) -> dict[int, float]:
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, Losses))
    return hook.losses


def train(work: Path, stop: int | None = None, **options) -> dict[int, float]:
    """Train to the end, or until it is stopped."""
    runner = make_runner(work, stop, **options)
    if stop is None:
        runner.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    # Whenever they are collected as garbage, up to 5 s are waited for each worker.
    iterator = getattr(runner.train_dataloader, '_iterator', None)
    if hasattr(iterator, '_shutdown_workers'):
        iterator._shutdown_workers()
    return losses(runner)


def names(folder: Path, pattern: str = '*.pth*') -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def pointed(work: Path) -> str:
    return Path((work / 'last_checkpoint').read_text()).name


def log(work: Path) -> str:
    return '\n'.join(path.read_text() for path in sorted(work.glob('*/*.log')))

"""Random numbers that depend on the seed and the progress of training, nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import DistSamplerSeedHook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ..registry import HOOKS


@HOOKS.register_module()
class ResumableSeedHook(DistSamplerSeedHook):
    """Makes the random numbers of training depend on its seed and its progress, nothing else.

    A resumed run then goes on exactly as it would have without the interruption: with the same
    order of the data, the same augmentations, the same dropped paths. Otherwise all random
    numbers would start anew when training is resumed. It replaces ``DistSamplerSeedHook``.

    - Training by epochs: workers of the dataloader start anew in each epoch, also persistent ones,
      seeded by (seed, epoch, rank, worker). Without a ``seed`` in the config, the one that the
      interrupted run drew is used, by its checkpoint.
    - Training by iterations: mmengine loads, and leaves out, the data of the iterations that are
      done, so that the workers get into the same state. This needs ``randomness.seed`` in the
      config and ``num_workers`` of 1 or more.
    - The generators of the training process (Python, NumPy, torch) are seeded by (seed, iteration)
      before each iteration. On a GPU, ``randomness.deterministic=True`` is needed for equal bits.

    Examples:
        >>> # in a config
        >>> default_hooks = dict(sampler_seed=dict(type='mmhrformer.ResumableSeedHook'))
    """

    def before_train(self, runner: Runner) -> None:
        """Warn once of random numbers that this hook does not seed.

        Args:
            runner (Runner): The runner.
        """
        loader = getattr(runner.train_loop, 'dataloader', None)
        if isinstance(loader, DataLoader):
            owners = [loader, *_samplers_of(loader)]
            if all(getattr(owner, 'generator', None) is None for owner in owners):
                return
            reason = 'has a generator of its own'
        else:
            reason = f'is {type(loader).__name__}, no DataLoader of torch'
        runner.logger.warning(
            f'train_dataloader {reason}: what it draws is not seeded by mmhrformer.'
            f'{type(self).__name__}, so that a resumed run may see other data than one that was '
            'left alone. What the training process draws is the same.'
        )

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the samplers and the workers.

        Args:
            runner (Runner): The runner.
        """
        loader = getattr(runner.train_loop, 'dataloader', None)
        samplers = _samplers_of(loader)
        for sampler in samplers:
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(runner.epoch)
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            return  # its workers have started already
        if not (runner.cfg.get('randomness') or {}).get('diff_rank_seed'):
            for sampler in samplers:
                if hasattr(sampler, 'seed'):
                    sampler.seed = runner.seed  # resuming has changed it to that of the checkpoint
        if isinstance(loader, DataLoader):
            init = loader.worker_init_fn
            if isinstance(init, partial) and init.func is _seed_worker:
                init = init.args[1]  # of the epoch before
            seeds = (runner.seed, runner.epoch, get_rank())
            loader.worker_init_fn = partial(_seed_worker, seeds, init)
            loader._iterator = None  # the workers of the epoch before, if they are persistent
        _seed(0, runner.seed, runner.iter)  # without workers, this process loads the data

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Seed this process.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Not used.
            data_batch: Not used.
        """
        _seed(0, runner.seed, runner.iter)


def _samplers_of(loader: object) -> list:
    """The samplers that a loader has; loaders of other libraries may have none."""
    batch_sampler = getattr(loader, 'batch_sampler', None)
    samplers = (
        getattr(loader, 'sampler', None),
        batch_sampler,
        getattr(batch_sampler, 'sampler', None),
    )
    return [sampler for sampler in samplers if sampler is not None]


def _seed(*numbers: int) -> None:
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _seed_worker(numbers: tuple[int, ...], init: Callable | None, worker: int) -> None:
    if init is not None:
        init(worker)
    _seed(1, *numbers, worker)

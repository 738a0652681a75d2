"""Random numbers that depend only on the seed and the progress of training."""

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
    """Make the random numbers of training depend only on its seed and its progress.

    A resumed run then continues exactly as it would have without the interruption: with the same
    order of the data, the same augmentations, the same dropped paths. Otherwise, resuming would
    restart all random numbers. It replaces ``DistSamplerSeedHook``.

    - Epoch-based training: the workers of the dataloader restart in each epoch, even persistent
      ones, seeded by (seed, epoch, rank, worker). Without a ``seed`` in the config, the one in the
      checkpoint of the interrupted run is used.
    - Iteration-based training: mmengine loads and skips the data of the completed iterations, which
      brings the workers into the same state. This needs ``randomness.seed`` in the config and
      ``num_workers`` of 1 or more.
    - The generators of the training process (Python, NumPy, torch) are seeded by (seed, iteration,
      rank) before each iteration, so that each GPU drops other paths and mixes its images by other
      ratios, as in the official classification code. On a GPU, ``randomness.deterministic=True`` is
      needed for bit-identical results.

    With gradient accumulation this holds for checkpoints after a multiple of
    ``accumulative_counts`` iterations: others lack the gradients accumulated since, and mmengine
    warns when it resumes from them.

    Examples:
        >>> # in a config
        >>> default_hooks = dict(sampler_seed=dict(type='mmhrformer.ResumableSeedHook'))
    """

    def before_train(self, runner: Runner) -> None:
        """Warn once about random numbers that this hook does not seed.

        Args:
            runner (Runner): The runner.
        """
        loader = getattr(runner.train_loop, 'dataloader', None)
        if isinstance(loader, DataLoader):
            owners = [loader, *_samplers_of(loader)]
            if all(getattr(owner, 'generator', None) is None for owner in owners):
                return
            reason = 'has its own generator'
        else:
            reason = f"is a {type(loader).__name__}, not torch's DataLoader"
        runner.logger.warning(
            f'train_dataloader {reason}: its random numbers are not seeded by mmhrformer.'
            f'{type(self).__name__}, so a resumed run may see other data than an uninterrupted '
            'one. The random numbers of the training process are the same.'
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
            return  # the workers have already started
        if not (runner.cfg.get('randomness') or {}).get('diff_rank_seed'):
            for sampler in samplers:
                if hasattr(sampler, 'seed'):
                    sampler.seed = runner.seed  # resuming restored that of the checkpoint
        if isinstance(loader, DataLoader):
            init = loader.worker_init_fn
            if isinstance(init, partial) and init.func is _seed_worker:
                init = init.args[1]  # from the previous epoch
            seeds = (runner.seed, runner.epoch, get_rank())
            loader.worker_init_fn = partial(_seed_worker, seeds, init)
            loader._iterator = None  # discard persistent workers of the previous epoch
        # Without workers, this process loads the data.
        _seed(0, runner.seed, runner.iter, get_rank())

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Seed this process.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Not used.
            data_batch: Not used.
        """
        _seed(0, runner.seed, runner.iter, get_rank())


def _samplers_of(loader: object) -> list:
    """The samplers of a loader; those of other libraries may have none."""
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

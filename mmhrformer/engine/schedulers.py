"""The learning rate schedule of the official classification code."""

from __future__ import annotations

import math
from numbers import Real

from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler

from ..registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(LRSchedulerMixin, _ParamScheduler):
    """Linear warm-up, then a cosine counted from the start of training.

    At the end of the warm-up the learning rate drops slightly, since the cosine has been running
    all along (like timm's ``CosineLRScheduler`` without ``warmup_prefix``, as used in the official
    code). mmengine's ``CosineAnnealingLR`` after a ``LinearLR`` starts its cosine there instead.
    timm sets the value of step k after iteration k, this schedule before it: one iteration earlier.

    The learning rate is set independently of other schedules, so consecutive schedules must not
    overlap.

    Args:
        optimizer (Optimizer | OptimWrapper): The optimizer.
        warmup (float): Length of the warm-up, in epochs, or iterations with ``by_epoch=False``.
        start_factor (float): Learning rate of the first step, as a multiple of the optimizer's.
        end_factor (float): Final learning rate of the cosine, as a multiple of the optimizer's.
            Defaults to 0.
        begin (int): Step at which the schedule and its warm-up begin, in the unit of ``warmup``.
            Defaults to 0.
        end (int): Step at which the schedule ends, in the unit of ``warmup``: the cosine takes
            ``end - begin``. Defaults to the length of the training.
        **kwargs: ``last_step``, ``by_epoch`` and ``verbose`` of mmengine's schedulers.

    Raises:
        ValueError: If ``begin`` is negative, there is no ``end``, ``warmup`` is not between 0 and
            ``end - begin``, or a factor is not between 0 and 1.
    """

    def __init__(
        self,
        optimizer,
        *,
        warmup: float,
        start_factor: float,
        end_factor: float = 0.0,
        begin: int = 0,
        end: int = INF,
        **kwargs,
    ) -> None:
        if not 0 <= begin < end < INF:
            raise ValueError(f'begin={begin}, end={end}: expected 0 <= begin < end')
        if not 0 <= warmup < end - begin:
            since = f' - begin={begin}' if begin else ''
            raise ValueError(
                f'warmup={warmup}: expected a length from 0 to less than end={end}{since}'
            )
        for name, factor in dict(start_factor=start_factor, end_factor=end_factor).items():
            if not (isinstance(factor, Real) and 0 <= factor <= 1):
                raise ValueError(
                    f'{name}={factor!r}: expected a number from 0 to 1, a multiple of the lr'
                )
        self.warmup = warmup
        self.start_factor = start_factor
        self.end_factor = end_factor
        super().__init__(optimizer, begin=begin, end=end, **kwargs)

    @classmethod
    def build_iter_from_epoch(
        cls,
        optimizer,
        *,
        warmup: float,
        begin: int = 0,
        end: int = INF,
        by_epoch: bool = True,
        epoch_length: int | None = None,
        **kwargs,
    ) -> WarmupCosineLR:
        """Build the schedule in iterations from one in epochs (``convert_to_iter_based``)."""
        if not by_epoch or not epoch_length:
            raise ValueError('convert_to_iter_based=True needs by_epoch=True and a train loader')
        return cls(
            optimizer,
            warmup=round(warmup * epoch_length),
            begin=int(begin * epoch_length),
            end=INF if end == INF else int(end * epoch_length),
            by_epoch=False,
            **kwargs,
        )

    def _get_value(self) -> list[float]:
        step = self.last_step  # counted from `begin`
        if step < self.warmup:
            factor = self.start_factor + (1 - self.start_factor) * step / self.warmup
        else:
            cosine = (1 + math.cos(math.pi * step / (self.end - self.begin))) / 2
            factor = self.end_factor + (1 - self.end_factor) * cosine
        return [base * factor for base in self.base_values]

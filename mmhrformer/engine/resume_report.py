"""Options that ``--resume`` takes from the checkpoint although the config differs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

# Options that do not affect results and depend on the device.
SWITCHES = {'params', 'fused', 'foreach', 'capturable', 'differentiable'}


def kept_by_resume(runner: Runner, checkpoint: Mapping) -> list[str]:
    """List the options that resuming silently resets to their values in the checkpoint.

    Args:
        runner (Runner): The runner, with its optimizer and schedules built, but not loaded yet.
        checkpoint (Mapping): The checkpoint to resume from.

    Returns:
        list[str]: One line per option whose values in checkpoint and config differ.
    """
    several = isinstance(runner.optim_wrapper, OptimWrapperDict)
    wrappers = dict(runner.optim_wrapper.items()) if several else {'': runner.optim_wrapper}
    schedules, saved_schedules = runner.param_schedulers, checkpoint.get('param_schedulers')
    differences = []
    for name, wrapper in wrappers.items():
        if 'optimizer' in checkpoint:
            saved = checkpoint['optimizer']
            differences += _of_optimizer(wrapper, saved[name] if several else saved)
        if schedules is not None and saved_schedules is not None:
            pair = [s[name] if isinstance(s, Mapping) else s for s in (schedules, saved_schedules)]
            differences += _of_schedules(*pair)
    lines = {}
    for option, value, saved in differences:  # only the first of several parameter groups
        lines.setdefault(option, f'{option}: {value} in the config, {saved} in the checkpoint')
    missing = [key for key in ('optimizer', 'param_schedulers') if key not in checkpoint]
    if schedules is None:
        missing = [key for key in missing if key == 'optimizer']
    lines.update((key, f'{key}: not in the checkpoint, starts from scratch') for key in missing)
    return [*lines.values(), *_of_length(runner, checkpoint)]


def _same(one: Any, other: Any) -> bool:
    one, other = (tuple(value) if isinstance(value, list) else value for value in (one, other))
    return bool(one == other)


def _of_optimizer(wrapper: OptimWrapper, saved: Mapping) -> Iterator[tuple[str, Any, Any]]:
    state = wrapper.state_dict()
    for group, saved_group in zip(state['param_groups'], saved['param_groups']):
        for key in sorted(group.keys() & saved_group.keys() - SWITCHES):
            # With a schedule, the plain value is only the current one.
            value, before = (g.get(f'initial_{key}', g[key]) for g in (group, saved_group))
            if not key.startswith('initial_') and not _same(value, before):
                yield f'optim_wrapper.optimizer.{key}', value, before
    scaler, saved_scaler = (s.get('loss_scaler') or {} for s in (state, saved))
    for key in ('growth_factor', 'backoff_factor', 'growth_interval'):
        if key in scaler and not _same(scaler[key], saved_scaler.get(key, scaler[key])):
            yield f'optim_wrapper.loss_scale.{key}', scaler[key], saved_scaler[key]


def _of_schedules(built: Sequence, saved: Sequence[Mapping]) -> Iterator[tuple[str, Any, Any]]:
    if len(built) != len(saved):
        yield 'param_scheduler', f'{len(built)} schedules', len(saved)
    for index, (schedule, state) in enumerate(zip(built, saved)):
        settings = _arguments(type(schedule)) & schedule.__dict__.keys()
        if not settings <= state.keys():
            what = f'a {type(schedule).__name__}'
            yield f'param_scheduler[{index}].type', what, 'a schedule of another kind'
        for key in sorted(settings & state.keys()):
            if not _same(getattr(schedule, key), state[key]):
                yield f'param_scheduler[{index}].{key}', *map(_plain, (schedule, state), [key] * 2)


def _plain(owner: Any, key: str) -> Any:
    value = owner[key] if isinstance(owner, Mapping) else getattr(owner, key)
    return sorted(value) if key == 'milestones' else value  # mmengine stores a Counter


def _arguments(kind: type) -> set[str]:
    """Names of the arguments of a class and its base classes."""
    names = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}
    return names - {'optimizer', 'last_step', 'verbose'}


def _of_length(runner: Runner, checkpoint: Mapping) -> list[str]:
    """Report if the training has become longer than its schedules."""
    states = checkpoint.get('param_schedulers') or ()
    if isinstance(states, Mapping):
        states = [state for group in states.values() for state in group]
    before = (checkpoint.get('message_hub') or {}).get('runtime_info') or {}
    for option, by_epoch in (('max_epochs', True), ('max_iters', False)):
        now, was = getattr(runner, option), before.get(option)
        ends: Iterable[int] = [s['end'] for s in states if s.get('by_epoch', True) is by_epoch]
        if was is not None and now > was and ends and now > max(ends):
            return [
                f'train_cfg.{option}: {now}, was {was}; but the schedule ends at {max(ends)}, '
                'and the rate stays constant from there'
            ]
    return []

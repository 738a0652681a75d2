"""Checks of a config before anything is built: data, unused options, GPU, batch size."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from mmengine.visualization.vis_backend import BaseVisBackend

from ..configs import name_of_type
from ..registry import VISBACKENDS
from .data_check import (
    biased_coordinates,
    missing_data,
    other_annotations,
    other_classes,
    other_codecs,
    renumbered_classes,
    surplus_classes,
    unpaired_keypoints,
)
from .dead_options import dead_options, late_variables, used_counterparts


def batch_size_change(cfg: Mapping, gpus: int) -> str:
    """Warning about a batch size that does not match the learning rate, or an empty string."""
    scale = cfg.get('auto_scale_lr') or {}
    base = scale.get('base_batch_size')
    batch = _mapping(cfg, 'train_dataloader').get('batch_size')
    wrapper = _mapping(cfg, 'optim_wrapper')
    steps = wrapper.get('accumulative_counts', 1)
    if not base or not batch:
        return ''
    rate = (wrapper.get('optimizer') or {}).get('lr')
    if scale.get('enable') and steps > 1:
        return (
            f'auto_scale_lr.enable=True scales the learning rate to {gpus * batch} images per '
            f'step: mmengine does not count optim_wrapper.accumulative_counts={steps}, which makes '
            f'them {gpus * batch * steps}. Set enable=False, and optim_wrapper.optimizer.lr for '
            f'that number yourself; the learning rate {rate} is for {base}.'
        )
    if scale.get('enable') or gpus * batch * steps == base:
        return ''
    return (
        f'The total batch size is {gpus * batch * steps} ({gpus} processes x {batch}'
        f'{f" x {steps} accumulated" if steps > 1 else ""}), but the learning rate {rate} is for '
        f'{base}. Add --cfg-options auto_scale_lr.enable=True, or set '
        'optim_wrapper.optimizer.lr yourself.'
    )


def needs_gpu(cfg: Mapping, processes: int, training: bool = True) -> str:
    """Warning about options that need a GPU on a machine without one, or an empty string."""
    if get_device() not in ('cpu', 'mps'):
        return ''
    wrapper = _mapping(cfg, 'optim_wrapper')
    if training and name_of_type(wrapper) == 'AmpOptimWrapper':
        others = [f'optim_wrapper.{key}' for key in ('dtype', 'loss_scale') if key in wrapper]
        and_remove = f', and remove {" and ".join(others)}' if others else ''
        return (
            "optim_wrapper.type='AmpOptimWrapper' (mixed precision) needs a GPU, but none was "
            f'found: add --cfg-options optim_wrapper.type=OptimWrapper{and_remove}'
        )
    if processes > 1 and name_of_type(_mapping(cfg, 'model_wrapper_cfg')) in (
        '', 'DistributedDataParallel', 'MMDistributedDataParallel',
    ):  # fmt: skip
        return (
            'model_wrapper_cfg: multiple processes without a GPU need --cfg-options '
            'model_wrapper_cfg.type=mmhrformer.CPUDistributedDataParallel'
        )
    return ''


def options_by_epoch(cfg: Mapping) -> list[str]:
    """List options that count epochs in a training by iterations, where they have no effect."""
    loop = _mapping(cfg, 'train_cfg')
    if not _counts_iterations(loop):
        return []
    options = _schedules(cfg)
    options['default_hooks.checkpoint'] = _mapping(_mapping(cfg, 'default_hooks'), 'checkpoint')
    return [
        f'{place}.by_epoch'
        for place, option in options.items()
        if isinstance(option, Mapping)
        and option.get('type')
        and 'Plateau' not in name_of_type(option)  # follows the validation
        and option.get('by_epoch', True)
        and not option.get('convert_to_iter_based')
    ]


def other_length(cfg: Mapping) -> str:
    """Warning about schedules and a training of different lengths, or an empty string.

    Schedules without an ``end`` last as long as the training; those that count iterations of
    a training by epochs are not compared.
    """
    loop = _mapping(cfg, 'train_cfg')
    unit = 'max_iters' if _counts_iterations(loop) else 'max_epochs'
    length = loop.get(unit)
    late, ends, decays = [], [], False
    for place, one in _schedules(cfg).items() if isinstance(length, int) else ():
        if not isinstance(one, Mapping) or one.get('by_epoch', True) != (unit == 'max_epochs'):
            continue
        end, milestones = one.get('end', length), one.get('milestones')
        if not isinstance(end, int):
            continue
        ends.append(end)
        if milestones and max(milestones) > min(end, length):
            late.append(f'{place}.milestones={list(milestones)} with end={end}')
        elif not milestones and end > length + 1:  # mmengine counts both ends
            late.append(f'{place}.end={end}')
        decays |= not milestones and not name_of_type(one).startswith(('Constant', 'Linear'))
    if late:
        fault = f'{" and ".join(late)}, which training does not reach'
    elif decays and max(ends) < length:
        fault = f'the last schedule ends at {max(ends)}, and the rate stays constant from there'
    else:
        return ''
    return f'train_cfg.{unit}={length}, but {fault}. Change the schedules along with it.'


def accumulated_iterations(cfg: Mapping) -> str:
    """Warning about a training by iterations that accumulates gradients, or an empty string."""
    iterations = _mapping(cfg, 'train_cfg').get('max_iters')
    steps = _mapping(cfg, 'optim_wrapper').get('accumulative_counts', 1)
    if steps == 1 or not iterations:
        return ''
    return (
        f'optim_wrapper.accumulative_counts={steps}, so train_cfg.max_iters={iterations} are '
        f'{iterations // steps} steps of the optimizer. For as many as without accumulation, '
        'multiply max_iters, val_interval, begin and end of the schedules, and the interval of '
        f'checkpoints by {steps}.'
    )


def _counts_iterations(loop: Mapping) -> bool:
    return name_of_type(loop) == 'IterBasedTrainLoop' or not loop.get('by_epoch', True)


def _schedules(cfg: Mapping) -> dict[str, Any]:
    """The schedules of a config by their place in it."""
    schedules = cfg.get('param_scheduler') or []
    if isinstance(schedules, Mapping):
        return {'param_scheduler': schedules}
    return {f'param_scheduler[{i}]': one for i, one in enumerate(schedules)}


def sliding_window_fault(cfg: Mapping) -> str:
    """Problem with mmsegmentation's sliding window in ``model.test_cfg``, or an empty string."""
    test_cfg = _mapping(_mapping(cfg, 'model'), 'test_cfg')
    if test_cfg.get('mode') != 'slide':
        return ''
    for key in ('crop_size', 'stride'):
        pair = test_cfg.get(key)
        if not isinstance(pair, Sequence) or len(pair) != 2 or min(pair) < 1:
            return (
                f"model.test_cfg.{key}={pair!r}: mode='slide' needs height and width of the window "
                "and of its stride, such as test_cfg=dict(mode='slide', crop_size=(512, 512), "
                'stride=(341, 341))'
            )
    if any(step > side for step, side in zip(test_cfg['stride'], test_cfg['crop_size'])):
        return (
            f'model.test_cfg.stride={test_cfg["stride"]!r} is larger than '
            f'crop_size={test_cfg["crop_size"]!r}, which leaves pixels without a result: '
            'use about two thirds of crop_size'
        )
    return ''


def _mapping(cfg: Mapping, key: str) -> Mapping:
    """An option if it is a config (it may have been built already), or an empty config."""
    value = cfg.get(key)
    return value if isinstance(value, Mapping) else {}


class ConfigCheckError(Exception):
    """The config of a run cannot work; users need only the message, not a traceback."""


class MissingDataError(ConfigCheckError, FileNotFoundError):
    """Data that a config refers to are missing."""


class ConfigOptionError(ConfigCheckError, ValueError):
    """An option of a config has no effect, or cannot work here."""


@VISBACKENDS.register_module(name=['ConfigCheckVisBackend', 'PreflightChecks'])
class ConfigCheckVisBackend(BaseVisBackend):
    """Check the config of a run before anything is built, and stop the run if it cannot work.

    It is a visualizer backend, since mmengine's runner passes the whole config to these before it
    builds the model, in all stock tools. It draws and stores nothing.

    - Missing data, folders of more classes than the model has, and a missing GPU are errors in
      ``train.py`` and ``test.py``, and warnings in other tools, which may not use them.
    - An option of an old framework, a variable that was set after it had been copied, or a sliding
      window without its sizes is an error; an unknown, unused option is a warning.
    - A class that has another index in the validation or test data than in the training data is an
      error in ``train.py`` and ``test.py``, and otherwise a warning.
    - A keypoint that is swapped on one side only is an error in ``train.py``, and otherwise a
      warning. A step of a pipeline that does not fit the decoder of a pose model is an error in
      ``train.py`` and ``test.py``.
    - An evaluator that reads other annotations than the dataset is a warning, and so are datasets
      with other ``metainfo.classes`` than the training data, and options that contradict the
      coordinates of a pose model's heatmaps.
    - A batch size that does not match the learning rate is a warning, and so are schedules of
      another length than the training, gradients accumulated in a training by iterations, and
      a schedule or a checkpoint hook that counts epochs in such a training.

    Its former name in configs, ``PreflightChecks``, works as well.

    Args:
        save_dir (str): Not used; mmengine passes it to every backend.
    """

    LOADERS = {
        'train': ('train_dataloader', 'val_dataloader'),
        'test': ('test_dataloader',),
    }

    @property
    def experiment(self) -> ConfigCheckVisBackend:
        """The backend itself."""
        return self

    def _init_env(self) -> None:
        pass

    def add_config(self, config: Config, **kwargs) -> None:
        """Check a config.

        Args:
            config (Config): The config of the run.

        Raises:
            MissingDataError: If data are missing; a FileNotFoundError.
            ConfigOptionError: If an option has no effect, cannot work or needs a GPU; a ValueError.
        """
        tool = Path(sys.argv[0]).stem
        _check_options(config)
        loaders = self.LOADERS.get(tool, ('train_dataloader', 'val_dataloader', 'test_dataloader'))
        missing = '\n'.join(missing_data(config, loaders))
        surplus = '\n'.join(surplus_classes(config, loaders))
        gpu = needs_gpu(config, get_world_size(), training=tool != 'test')
        if missing and tool in self.LOADERS:
            raise MissingDataError(f'data are missing:\n{missing}' + (gpu and f'\n{gpu}'))
        if (surplus or gpu) and tool in self.LOADERS:
            raise ConfigOptionError(surplus or gpu)
        if missing:
            _warn(f'Data are missing:\n{missing}')
        for text in filter(None, (surplus, gpu)):
            _warn(text)
        _check_data(config, tool)
        if options := options_by_epoch(config):
            _warn(
                'train_cfg counts iterations, so no epoch ends before training does, but these '
                f'options are True, their default: {", ".join(options)}. Set them to False.'
            )
        changes = (
            batch_size_change(config, get_world_size()),
            accumulated_iterations(config),
            other_length(config),
        )
        for change in filter(None, changes if tool != 'test' else ()):
            _warn(change)


def _check_data(config: Config, tool: str) -> None:
    """Refuse data that the frameworks accept, but that give wrong results."""
    for fault, lines, tools in (
        ('classes have several indices', renumbered_classes(config), ('train', 'test')),
        ('keypoints are swapped on one side only', unpaired_keypoints(config), ('train',)),
        ('the data do not fit the decoder', other_codecs(config), ('train', 'test')),
        ('keypoints are off by half a pixel of the input', biased_coordinates(config), ()),
        ('datasets have other classes', other_classes(config), ()),
        ('evaluators read other annotations than the data have', other_annotations(config), ()),
    ):
        text = f'{fault}:\n' + '\n'.join(lines)
        if lines and tool in tools:
            raise ConfigOptionError(text)
        if lines:
            _warn(text)


def _check_options(config: Config) -> None:
    if fault := sliding_window_fault(config):
        raise ConfigOptionError(fault)
    dead = dead_options(config)
    wrong = [f'{key} has no effect: {remedy}' for key, remedy in dead.items() if remedy]
    if wrong:
        raise ConfigOptionError('unused options in the config:\n' + '\n'.join(wrong))
    if dead:
        _warn(f'These options of the config are not used: {", ".join(dead)}.')
    for key in dead:
        if counterparts := used_counterparts(config, key):
            _warn(f'Used instead of {key}: {", ".join(counterparts)}.')
    for key, places in late_variables(config).items():
        _warn(f'{key} was changed, but these still have its old value: {", ".join(places)}.')


def _warn(text: str) -> None:
    print_log(text, 'current', level=logging.WARNING)

"""What can be told from a config alone: missing data, dead options, a changed batch size."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmengine.visualization.vis_backend import BaseVisBackend

from ..registry import VISBACKENDS

# Dataset class -> its chapter in docs/datasets.md.
CHAPTERS = {
    'ImageNet': '#imagenet-1k',
    'CocoDataset': '#coco-keypoints',
    'CityscapesDataset': '#cityscapes',
    'PascalContextDataset59': '#pascal-context',
    'COCOStuffDataset': '#coco-stuff-10k',
    'ADE20KDataset': '#ade20k',
}

# What the stock tools and libraries read beside the arguments of mmengine's Runner.
READ_ELSEWHERE = {
    'activation_checkpointing', 'compile', 'custom_imports', 'data_mode', 'model_wrapper_cfg',
    'preprocess_cfg', 'runner_type', 'strategy', 'tta_model', 'tta_pipeline',
}  # fmt: skip

# Options of the old 0.x frameworks that nothing reads any more, and what does their work.
REPLACED = {
    'fp16': "optim_wrapper.type='AmpOptimWrapper'",
    'optimizer': 'optim_wrapper.optimizer',
    'optimizer_config': 'optim_wrapper.clip_grad',
    'lr_config': 'param_scheduler',
    'momentum_config': 'param_scheduler',
    'runner': 'train_cfg',
    'total_epochs': 'train_cfg.max_epochs',
    'data': 'train_dataloader, val_dataloader and test_dataloader',
    'evaluation': 'val_evaluator and train_cfg.val_interval',
    'checkpoint_config': 'default_hooks.checkpoint',
    'log_config': 'default_hooks.logger',
    'dist_params': 'env_cfg.dist_cfg',
    'workflow': 'train_cfg',
    'samples_per_gpu': 'train_dataloader.batch_size',
    'find_unused_parameters': 'model_wrapper_cfg.find_unused_parameters',
}

# Helper variables of our own configs: they are copied into other options when the file is read.
HELPERS = {
    'codec', 'crop_size', 'class_weight', 'data_root', 'dataset_type', 'test_pipeline',
    'train_pipeline', 'val_pipeline',
}  # fmt: skip


def missing_data(cfg: Mapping, loaders: Sequence[str]) -> list[str]:
    """List the files and folders that datasets of a config want and that do not exist.

    Args:
        cfg (Mapping): The config.
        loaders (Sequence[str]): The dataloaders to look at, such as ``'train_dataloader'``.

    Returns:
        list[str]: A line for each, with the option, the path and where to read about it.
    """
    lines = []
    for loader in loaders:
        for dataset in _datasets((cfg.get(loader) or {}).get('dataset')):
            chapter = CHAPTERS.get(str(dataset.get('type')).split('.')[-1], '')
            for option, path in _paths(dataset):
                if '://' not in path and not Path(path).exists():
                    lines.append(
                        f'{loader}.dataset.{option}: there is no {path!r}; '
                        f'docs/datasets.md{chapter} tells how to get it'
                    )
    return lines


def _datasets(dataset: Any) -> Iterator[Mapping]:
    """The innermost datasets: repeated and concatenated ones are wrapped in others."""
    if not isinstance(dataset, Mapping):
        return
    inner = dataset.get('datasets') or ([dataset['dataset']] if 'dataset' in dataset else [])
    if not inner:
        yield dataset
    for one in inner:
        yield from _datasets(one)


def _paths(dataset: Mapping) -> Iterator[tuple[str, str]]:
    """Options of a dataset that name files or folders, and the paths they mean."""
    root = dataset.get('data_root') or ''
    if root and not Path(root).exists():
        yield 'data_root', root  # one line instead of one for each part
        return
    prefixes = dataset.get('data_prefix') or {}
    if isinstance(prefixes, str):
        prefixes = {'': prefixes}
    inside = {f'data_prefix.{key}'.rstrip('.'): path for key, path in prefixes.items()}
    inside['ann_file'] = dataset.get('ann_file')
    if not prefixes and not dataset.get('ann_file'):
        inside['split'] = dataset.get('split')
    for option, path in inside.items():
        if path:
            yield option, path if '://' in path else str(Path(root, path))
    if dataset.get('bbox_file'):
        yield 'bbox_file', dataset['bbox_file']


def dead_options(cfg: Config) -> dict[str, str]:
    """Find top-level options that nothing reads.

    Args:
        cfg (Config): The config.

    Returns:
        dict[str, str]: What to do instead, or an empty string, by option. Variables whose value
        stands elsewhere in the config are not dead.
    """
    read = set(inspect.signature(Runner.__init__).parameters) | READ_ELSEWHERE
    values = list(_values([value for key, value in cfg.items() if key in read]))
    unused = [
        key
        for key, value in cfg.items()
        if key not in read and not any(_same(value, other) for other in values)
    ]
    dead = {key: '' for key in unused if key not in HELPERS}
    dead.update((key, f'use {REPLACED[key]}') for key in cfg if key in REPLACED)
    # Where somebody changed what the variable was copied to, it is harmless; where somebody
    # changed only the variable, nothing happens.
    in_file = Config.fromfile(cfg.filename, import_custom_modules=False) if cfg.filename else cfg
    for key in HELPERS & set(unused):
        if in_file.get(key) != cfg[key]:
            dead[key] = 'it was copied when the file was read: set the options it was copied to'
    return dead


def _values(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _values(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _values(inner)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, str) and isinstance(other, str):
        return other.startswith(value)
    return type(value) is type(other) and value == other


def batch_size_change(cfg: Mapping, gpus: int) -> str:
    """Tell if a run takes other batches than its learning rate is for.

    Args:
        cfg (Mapping): The config.
        gpus (int): Number of processes.

    Returns:
        str: The warning, or an empty string.
    """
    scale = cfg.get('auto_scale_lr') or {}
    base = scale.get('base_batch_size')
    batch = (cfg.get('train_dataloader') or {}).get('batch_size')
    wrapper = cfg.get('optim_wrapper') or {}
    steps = wrapper.get('accumulative_counts', 1)
    if not base or not batch or scale.get('enable') or gpus * batch * steps == base:
        return ''
    rate = (wrapper.get('optimizer') or {}).get('lr')
    return (
        f'This run takes {gpus * batch * steps} images a step ({gpus} processes x {batch}'
        f'{f" x {steps} accumulated" if steps > 1 else ""}), but the learning rate {rate} is for '
        f'{base}. Add --cfg-options auto_scale_lr.enable=True, or set '
        'optim_wrapper.optimizer.lr yourself.'
    )


@VISBACKENDS.register_module()
class PreflightChecks(BaseVisBackend):
    """Checks the config of a run before anything is built, and stops it if it cannot work.

    It is a backend of the visualizer because that is what mmengine's runner hands the whole config
    to before it builds the model, whichever stock tool is running. It records nothing.

    Started by ``train.py`` or ``test.py``, missing data is an error; elsewhere, where nobody knows
    which of the dataloaders will be used, a warning. So is an unknown option that nothing reads;
    one that has become another option, or a helper variable of our configs set too late, is an
    error. A batch size that the learning rate is not for is a warning.

    Args:
        save_dir (str): Not used; mmengine gives it to every backend.
    """

    LOADERS = {
        'train': ('train_dataloader', 'val_dataloader'),
        'test': ('test_dataloader',),
    }

    @property
    def experiment(self) -> PreflightChecks:
        """What mmengine asks every backend for."""
        return self

    def _init_env(self) -> None:
        pass

    def add_config(self, config: Config, **kwargs) -> None:
        """Check a config.

        Args:
            config (Config): The config of the run.

        Raises:
            FileNotFoundError: If data are missing.
            ValueError: If an option has no effect.
        """
        tool = Path(sys.argv[0]).stem
        dead = dead_options(config)
        wrong = [f'{key}: has no effect, {remedy}' for key, remedy in dead.items() if remedy]
        if wrong:
            raise ValueError('options of the config that nothing reads:\n' + '\n'.join(wrong))
        if dead:
            _warn(f'Nothing reads these options of the config: {", ".join(dead)}.')
        loaders = self.LOADERS.get(tool, ('train_dataloader', 'val_dataloader', 'test_dataloader'))
        missing = missing_data(config, loaders)
        if missing and tool in self.LOADERS:
            raise FileNotFoundError('data are missing:\n' + '\n'.join(missing))
        if missing:
            _warn('Data are missing:\n' + '\n'.join(missing))
        change = batch_size_change(config, get_world_size())
        if change and tool != 'test':
            _warn(change)


def _warn(text: str) -> None:
    print_log(text, 'current', level=logging.WARNING)

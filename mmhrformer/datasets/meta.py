"""Classes, keypoints and image sizes of datasets, from configs and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from ..configs import name_of_type

# Pipeline steps that give images a fixed size: the option, and whether the width comes first.
SIZES = {
    'BottomupRandomAffine': ('input_size', True),
    'BottomupResize': ('input_size', True),
    'CenterCrop': ('crop_size', True),
    'EfficientNetCenterCrop': ('crop_size', False),
    'EfficientNetRandomCrop': ('scale', False),
    'PlaceRandomly': ('size', False),
    'RandomCrop': ('crop_size', False),
    'RandomResizedCrop': ('scale', False),
    'Resize': ('scale', True),
    'TopdownAffine': ('input_size', True),
}


def find_classes(cfg: Config, num_classes: int, dataset_meta: Mapping) -> tuple:
    """Find the names and colors of classes in the config, or otherwise in the checkpoint.

    If both have names that differ, a warning is logged.

    Args:
        cfg (Config): The config.
        num_classes (int): Number of classes.
        dataset_meta (Mapping): ``dataset_meta`` of the checkpoint, see :func:`meta_of_checkpoint`.

    Returns:
        tuple: Names and colors, each None if unknown for that number of classes.
    """
    names = colors = None
    for source in (meta_of_dataset(cfg), dataset_meta):
        found = tuple(map(str, source.get('classes') or ()))
        if names is None and len(found) == num_classes:
            names = found
            palette = source.get('palette') or ()
            colors = [list(color) for color in palette] if len(palette) == num_classes else None
        elif len(found) == num_classes and found != names:
            first = next(i for i in range(num_classes) if found[i] != names[i])
            print_log(
                'The names of the classes are those of the config, but the checkpoint has others, '
                f'such as {found[first]!r} instead of {names[first]!r}. Correct the metainfo of '
                'test_dataloader.dataset if these are wrong.',
                'current',
                logging.WARNING,
            )
    return names, colors


def meta_of_dataset(cfg: Config) -> dict:
    """Read the metainfo of the test dataset of a config.

    Args:
        cfg (Config): The config.

    Returns:
        dict: Its metainfo, as the dataset would have it; empty if the config has none.
    """
    dataset = wrapped_dataset(cfg, 'metainfo')
    kind, given = dataset.get('type'), dataset.get('metainfo')
    if isinstance(kind, str):
        kind = DATASETS.get(kind if '.' in kind else f'{cfg.default_scope}.{kind}')
    if classes := dataset.get('classes'):  # an option of mmpretrain's datasets
        given = {'classes': classes, **(given or {})}
    if hasattr(kind, '_load_metainfo'):  # knows METAINFO, and reads files
        return kind._load_metainfo(given)
    return dict(given or {})


def wrapped_dataset(cfg: Mapping, option: str) -> dict:
    """Find the test dataset of a config that has an option, inside dataset wrappers.

    Args:
        cfg (Mapping): The config.
        option (str): The option.

    Returns:
        dict: Config of the outermost dataset with the option, or otherwise of the innermost one.
    """
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while not dataset.get(option) and (dataset.get('datasets') or dataset.get('dataset')):
        dataset = dataset['datasets'][0] if dataset.get('datasets') else dataset['dataset']
    return dataset


def augmented_tests(cfg: Mapping) -> str:
    """Find test-time augmentation in the model or the test pipeline of a config.

    Args:
        cfg (Mapping): The config.

    Returns:
        str: The class that does it, such as ``'TestTimeAug'``; empty if there is none.
    """
    steps = wrapped_dataset(cfg, 'pipeline').get('pipeline') or ()
    kinds = map(name_of_type, [cfg.get('model') or {}, *steps])
    return next((kind for kind in kinds if kind.endswith(('TestTimeAug', 'TTAModel'))), '')


def names_of_outputs(
    cfg: Config, dataset_meta: Mapping[str, Any] | None = None, number: int | None = None
) -> list[str]:
    """Find the names of the classes or keypoints that a model predicts.

    Args:
        cfg (Config): Its config.
        dataset_meta (Mapping, optional): Metainfo of the training dataset in the checkpoint, which
            takes precedence. Defaults to None: only that of the config's dataset.
        number (int, optional): Number of classes or keypoints of the model; other numbers of names
            are not used. Defaults to None: any.

    Returns:
        list[str]: The names; empty if unknown before the data are loaded.
    """
    infos = dataset_meta or {}, meta_of_dataset(cfg)
    named = (
        info.get('classes') or info.get('CLASSES') or (info.get('keypoint_id2name') or {}).values()
        for info in infos
    )
    return list(map(str, _first_fitting(named, number)))


def flip_indices_of_outputs(
    cfg: Config, dataset_meta: Mapping[str, Any] | None = None, number: int | None = None
) -> list[int]:
    """Find the keypoints that swap with each keypoint of a model in a mirror image.

    Args:
        cfg (Config): As for :func:`names_of_outputs`.
        dataset_meta (Mapping, optional): As for :func:`names_of_outputs`. Defaults to None.
        number (int, optional): As for :func:`names_of_outputs`. Defaults to None: any.

    Returns:
        list[int]: Their indices; empty if unknown, and for other models.
    """
    infos = dataset_meta or {}, meta_of_dataset(cfg)
    return list(_first_fitting((info.get('flip_indices') or () for info in infos), number))


def _first_fitting(lists: Iterable[Sized], number: int | None) -> Iterable:
    """The first list that is not empty and has the given number of entries, if any."""
    return next((one for one in lists if len(one) and number in (None, len(one))), ())


def default_size(cfg: Config) -> tuple[int, int]:
    """Find the size of the images that a config trains with.

    Args:
        cfg (Config): The config.

    Returns:
        tuple[int, int]: Height and width after the last pipeline step that gives images a fixed
        size; 224x224 if there is none.
    """
    model = cfg.get('model', {})
    steps = [
        *_steps(cfg.get('train_dataloader')),
        *reversed(cfg.get('train_pipeline', [])),
        *_steps(cfg.get('test_dataloader')),
        # In a config without data: the codec of a pose model, the crop of a segmentor.
        {**(_get(_get(model, 'head'), 'decoder') or {}), 'type': 'TopdownAffine'},
        {**(_get(model, 'data_preprocessor') or {}), 'type': 'PlaceRandomly'},
    ]
    for step in steps:
        kind = step['type'] if isinstance(step['type'], str) else step['type'].__name__
        option, width_first = SIZES.get(kind.split('.')[-1], ('', False))
        size = step.get(option)
        if size and not step.get('keep_ratio'):
            size = (size, size) if isinstance(size, int) else tuple(size)
            return size[::-1] if width_first else size
    return 224, 224


def _get(cfg: Any, name: str) -> Any:
    return cfg.get(name) if isinstance(cfg, Mapping) else None


def _steps(cfg: Any) -> list:
    """The pipeline of a data loader or of nested datasets, last step first."""
    inner = _get(cfg, 'dataset') or _get(cfg, 'datasets')
    if isinstance(inner, Sequence):
        inner = inner[0]
    return [*reversed(_get(cfg, 'pipeline') or []), *(_steps(inner) if inner else [])]

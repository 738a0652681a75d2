"""Classes and keypoints of data sets, from configs and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from mmengine.config import Config
from mmengine.registry import DATASETS


def find_classes(cfg: Config, num_classes: int, dataset_meta: Mapping) -> tuple:
    """Find the names and colors of classes in the config, or else in the checkpoint.

    Args:
        cfg (Config): The config.
        num_classes (int): Number of classes.
        dataset_meta (Mapping): ``dataset_meta`` of the checkpoint, see :func:`meta_of_checkpoint`.

    Returns:
        tuple: Names and colors, each None where none of that number are known.
    """
    names = colors = None
    for source in (meta_of_dataset(cfg), dataset_meta):
        if names is None and len(source.get('classes') or ()) == num_classes:
            names = tuple(map(str, source['classes']))
            palette = source.get('palette') or ()
            colors = [list(color) for color in palette] if len(palette) == num_classes else None
    return names, colors


def meta_of_dataset(cfg: Config) -> dict:
    """Read the meta information of the test data set of a config.

    Args:
        cfg (Config): The config.

    Returns:
        dict: Its ``metainfo``, over that of its class; empty if the config has none.
    """
    dataset = wrapped_dataset(cfg, 'metainfo')
    kind = dataset.get('type')
    if isinstance(kind, str):
        kind = DATASETS.get(kind if '.' in kind else f'{cfg.default_scope}.{kind}')
    return {**(getattr(kind, 'METAINFO', None) or {}), **(dataset.get('metainfo') or {})}


def wrapped_dataset(cfg: Config, option: str) -> dict:
    """Find the test data set of a config that has an option, inside of those that wrap others.

    Args:
        cfg (Config): The config.
        option (str): The option.

    Returns:
        dict: The config of the data set: the outermost one with the option, else the innermost.
    """
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while not dataset.get(option) and (dataset.get('datasets') or dataset.get('dataset')):
        dataset = dataset['datasets'][0] if dataset.get('datasets') else dataset['dataset']
    return dataset

"""Names and colours of classes and keypoints, from data sets and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS


def find_classes(cfg: Config, num_classes: int, dataset_meta: Mapping) -> tuple:
    """Names and colours of classes, from the config or else from the checkpoint.

    Args:
        cfg (Config): The config.
        num_classes (int): How many there are.
        dataset_meta (Mapping): What the checkpoint tells, as :func:`meta_of_checkpoint` returns it.

    Returns:
        tuple: Names and colours, each None where nothing fits.
    """
    names = colours = None
    for source in (meta_of_dataset(cfg), dataset_meta):
        if names is None and len(source.get('classes') or ()) == num_classes:
            names = tuple(map(str, source['classes']))
            palette = source.get('palette') or ()
            colours = [list(colour) for colour in palette] if len(palette) == num_classes else None
    return names, colours


def meta_of_dataset(cfg: Config) -> dict:
    """Metainfo of the test data set of a config: its classes or keypoints.

    Args:
        cfg (Config): The config.

    Returns:
        dict: Its options, over those of its class; empty if the config has none. Of data sets that
        wrap others, those of the first one inside.
    """
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while not dataset.get('metainfo') and (dataset.get('datasets') or dataset.get('dataset')):
        dataset = dataset['datasets'][0] if dataset.get('datasets') else dataset['dataset']
    kind = dataset.get('type')
    if isinstance(kind, str):
        kind = DATASETS.get(kind if '.' in kind else f'{cfg.default_scope}.{kind}')
    return {**(getattr(kind, 'METAINFO', None) or {}), **(dataset.get('metainfo') or {})}


def make_palette(num_classes: int) -> list[list[int]]:
    """Colours for classes that have none, well apart and always the same."""
    hues = (np.arange(num_classes) * 0.618 * 180 % 180).astype(np.uint8)  # the golden ratio
    values = np.where(np.arange(num_classes) % 2, 150, 230).astype(np.uint8)
    hsv = np.stack([hues, np.full_like(hues, 190), values], 1)[None]
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0].tolist()

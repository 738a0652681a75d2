"""Faults in the datasets of a config: missing files, and options that contradict others."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from ..configs import name_of_type
from ..utils.addresses import find_page

# Dataset class -> its section in docs/datasets.md.
SECTIONS = {
    'ImageNet': '#imagenet-1k',
    'CocoDataset': '#coco-keypoints',
    'CityscapesDataset': '#cityscapes',
    'PascalContextDataset59': '#pascal-context',
    'COCOStuffDataset': '#coco-stuff-10k',
    'ADE20KDataset': '#ade20k',
}
FRAMEWORKS = {'mmengine', 'mmpretrain', 'mmpose', 'mmseg', 'mmdet'}
SPLIT_IS_A_FOLDER = {'ImageNet', 'ImageNet21k'}  # elsewhere it is a list of images, or a file


def missing_data(cfg: Mapping, loaders: Sequence[str]) -> list[str]:
    """List the files and folders that datasets of a config need but that do not exist.

    Datasets that download themselves (``download=True``), that are read through another backend
    than local files, and classes that read their files in their own way are not checked.

    Args:
        cfg (Mapping): The config.
        loaders (Sequence[str]): The dataloaders to check, such as ``'train_dataloader'``.

    Returns:
        list[str]: One line per missing path, with the option, the path and a link to the docs.
    """
    lines = []
    for loader in loaders:
        for dataset in _innermost(cfg.get(loader)):
            name = name_of_type(dataset)
            missing = [
                (option, path)
                for option, path in _paths(dataset, name)
                if '://' not in path and not Path(path).exists()
            ]
            if not missing or _is_remote(dataset) or _is_left_alone(dataset, cfg):
                continue
            section = '' if dataset.get('metainfo') else SECTIONS.get(name, '')
            page = find_page(f'docs/datasets.md{section}')
            hint = f'; {page} explains how to get it' if section else ''
            lines += [
                f'{loader}.dataset.{option}: there is no {path!r}{hint}' for option, path in missing
            ]
    return lines


def surplus_classes(cfg: Mapping, loaders: Sequence[str]) -> list[str]:
    """List datasets of mmpretrain with more folders of classes than the model has outputs.

    Otherwise the loss fails at the first image of such a class, on a GPU without a reason.

    Args:
        cfg (Mapping): The config.
        loaders (Sequence[str]): The dataloaders to check, such as ``'train_dataloader'``.

    Returns:
        list[str]: One line per dataset, with the options, the numbers and the fix.
    """
    head = (cfg.get('model') or {}).get('head')
    outputs = head.get('num_classes') if isinstance(head, Mapping) else None
    lines = []
    for loader in loaders if isinstance(outputs, int) else []:
        for dataset in _innermost(cfg.get(loader)):
            path, names = _class_folders(dataset)
            if len(names) > outputs:
                lines.append(
                    f'{loader}.dataset: {path!r} has {len(names)} folders of classes, '
                    f'but model.head.num_classes={outputs}: set it and num_classes of '
                    f'data_preprocessor to {len(names)}, or remove folders that are not classes'
                )
    return lines


def _class_folders(dataset: Mapping) -> tuple[str, list[str]]:
    """Path and names of the folders that a dataset of mmpretrain takes for classes, if any."""
    if name_of_type(dataset) != 'CustomDataset' or not dataset.get('with_label', True):
        return '', []
    options = list(_paths(dataset, 'CustomDataset')) or [('', dataset.get('data_root'))]
    if len(options) != 1 or not os.path.isdir(options[0][1] or ''):
        return '', []  # with an ann_file, the folders are no classes
    folders = Path(options[0][1]).glob('[!.]*')
    return options[0][1], sorted(one.name for one in folders if one.is_dir())


def renumbered_classes(cfg: Mapping) -> list[str]:
    """List datasets of mmpretrain that give a class another index than the training data do.

    Indices are positions among the folders. If the validation data lack a folder, those of the
    classes after it shift, and mmpretrain counts their images as wrong.

    Args:
        cfg (Mapping): The config.

    Returns:
        list[str]: One line per dataset, with the first such class and the fix.
    """
    trained: dict[str, int] = {}
    for dataset in _innermost(cfg.get('train_dataloader')):
        trained = trained or {name: i for i, name in enumerate(_class_folders(dataset)[1])}
    lines = []
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader') if trained else ():
        for dataset in _innermost(cfg.get(loader)):
            path, names = _class_folders(dataset)
            wrong = [name for i, name in enumerate(names) if trained.get(name) != i]
            if wrong:
                index = trained.get(wrong[0], 'none')
                lines.append(
                    f'{loader}.dataset: {wrong[0]!r} in {path!r} is class '
                    f'{names.index(wrong[0])}, but in the training data {index}: create the same '
                    'folders in both, empty ones for classes without images, or remove surplus ones'
                )
    return lines


def other_classes(cfg: Mapping) -> list[str]:
    """List datasets with another ``metainfo.classes`` than the training data.

    Args:
        cfg (Mapping): The config.

    Returns:
        list[str]: One line per dataset; none for a dataset of another type without such an option.
    """

    def given(dataset: Mapping) -> tuple | None:
        classes = (dataset.get('metainfo') or {}).get('classes')
        return tuple(classes) if isinstance(classes, (list, tuple)) else classes

    train, *_ = [*_innermost(cfg.get('train_dataloader')), {}]
    return [
        f'{loader}.dataset.metainfo.classes is {given(dataset)}, but {given(train)} in training'
        for loader in ('val_dataloader', 'test_dataloader')
        for dataset in _innermost(cfg.get(loader))
        if train
        and given(dataset) != given(train)
        and (None not in (given(dataset), given(train)) or dataset.get('type') == train.get('type'))
    ]


def unpaired_keypoints(cfg: Mapping) -> list[str]:
    """List keypoints that are swapped with one that is not swapped with them.

    mmpose accepts them, and gives flipped images the wrong targets.

    Args:
        cfg (Mapping): The config.

    Returns:
        list[str]: One line per keypoint, with the option, the names and the fix.
    """
    lines = []
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for dataset in _innermost(cfg.get(loader)):
            info = dataset.get('metainfo') or {}
            if Path(info.get('from_file') or '').is_file():
                info = Config.fromfile(info['from_file']).get('dataset_info', {})
            points = (info.get('keypoint_info') or {}).values()
            swaps = {point['name']: point.get('swap') or point['name'] for point in points}
            lines += [
                f'{loader}.dataset.metainfo: keypoint {name!r} has swap={other!r}, '
                + (
                    f'but {other!r} has swap={swaps[other]!r}: set that to {name!r}'
                    if other in swaps
                    else 'which is not the name of a keypoint'
                )
                for name, other in swaps.items()
                if swaps.get(other) != name
            ]
    return lines


def other_codecs(cfg: Mapping) -> list[str]:
    """List pipeline steps that do not fit the decoder of a pose model.

    mmpose accepts them, and scales coordinates wrongly.

    Args:
        cfg (Mapping): The config.

    Returns:
        list[str]: One line per option, with both values.
    """
    head = (cfg.get('model') or {}).get('head')
    decoder = head.get('decoder') if isinstance(head, Mapping) else None
    if not isinstance(decoder, Mapping):  # several codecs, or another task
        return []
    lines = []
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for dataset in _innermost(cfg.get(loader)):
            for i, step in enumerate(dataset.get('pipeline') or ()):
                kind, place = name_of_type(step), f'{loader}.dataset.pipeline.{i}'
                if kind == 'TopdownAffine':
                    lines += _differences(place, step, decoder, ('input_size',))
                elif kind == 'GenerateTarget' and isinstance(step.get('encoder'), Mapping):
                    keys = 'type', 'input_size', 'heatmap_size'
                    # types with or without the scope, or as classes, are the same
                    pair = (
                        {**one, 'type': name_of_type(one)} for one in (step['encoder'], decoder)
                    )
                    lines += _differences(f'{place}.encoder', *pair, keys)
    return lines


def biased_coordinates(cfg: Mapping) -> list[str]:
    """List options that contradict the coordinates of a pose model's heatmaps.

    ``UDPHeatmap`` counts the distances between pixel centers, ``MSRAHeatmap`` pixels. mmpose
    accepts a mixture, and keypoints are off by half a pixel of the input.

    Args:
        cfg (Mapping): The config.

    Returns:
        list[str]: One line per option, with the values that fit together.
    """
    model = cfg.get('model') or {}
    head, test_cfg = model.get('head'), model.get('test_cfg') or {}
    decoder = head.get('decoder') if isinstance(head, Mapping) else None
    codec = name_of_type(decoder) if isinstance(decoder, Mapping) else ''
    if codec not in ('UDPHeatmap', 'MSRAHeatmap'):
        return []
    udp = codec == 'UDPHeatmap'
    fault = f', but model.head.decoder is a {codec}: set it to '
    lines = [
        f'{loader}.dataset.pipeline.{i}.use_udp={not udp}{fault}{udp}'
        for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader')
        for dataset in _innermost(cfg.get(loader))
        for i, step in enumerate(dataset.get('pipeline') or ())
        if name_of_type(step) == 'TopdownAffine' and bool(step.get('use_udp')) != udp
    ]
    if udp and test_cfg.get('flip_test') and test_cfg.get('shift_heatmap'):
        lines.append(f'model.test_cfg.shift_heatmap=True{fault}False')
    return lines


def _differences(
    place: str, option: Mapping, decoder: Mapping, keys: Iterable[str]
) -> Iterator[str]:
    for key in keys:
        found, wanted = (
            tuple(value) if isinstance(value, list) else value
            for value in (option.get(key), decoder.get(key))
        )
        if found is not None and wanted is not None and found != wanted:
            yield f'{place}.{key}={found!r}, but model.head.decoder.{key}={wanted!r}'


def other_annotations(cfg: Mapping) -> list[str]:
    """List evaluators that read other annotations than the dataset that they evaluate.

    Args:
        cfg (Mapping): The config.

    Returns:
        list[str]: One line per evaluator, with both files.
    """
    lines = []
    for split in ('val', 'test'):
        datasets = list(_innermost(cfg.get(f'{split}_dataloader')))
        evaluators = cfg.get(f'{split}_evaluator')
        evaluators = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
        for one in evaluators if len(datasets) == 1 and datasets[0].get('ann_file') else ():
            file = os.path.join(datasets[0].get('data_root') or '', datasets[0]['ann_file'])
            read = one.get('ann_file') if isinstance(one, Mapping) else None
            if read and os.path.normpath(read) != os.path.normpath(file):
                lines.append(
                    f'{split}_evaluator.ann_file is {read!r}, but {split}_dataloader.dataset reads '
                    f'{file!r}'
                )
    return lines


def _innermost(value: Any) -> Iterator[Mapping]:
    """The innermost datasets of a loader, inside wrappers that repeat or concatenate them."""
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _innermost(one)
    elif isinstance(value, Mapping):
        inner = value.get('datasets') or value.get('dataset')
        if inner is not None:
            yield from _innermost(inner)
        else:
            yield value


def _paths(dataset: Mapping, name: str) -> Iterator[tuple[str, str]]:
    """Options of a dataset for files or folders, and their paths."""
    root = str(dataset.get('data_root') or '')
    prefixes = dataset.get('data_prefix') or {}
    if not isinstance(prefixes, Mapping):
        prefixes = {'': prefixes}
    options = {f'data_prefix.{key}'.rstrip('.'): value for key, value in prefixes.items()}
    if 'LoadAnnotations' not in str(dataset.get('pipeline', 'LoadAnnotations')):
        options.pop('data_prefix.seg_map_path', None)  # prediction needs no labels
    options['ann_file'] = dataset.get('ann_file')
    if name in SPLIT_IS_A_FOLDER and not any(options.values()):
        options['split'] = dataset.get('split')
    paths = [
        (option, str(path))
        for option, value in options.items()
        for path in (value if isinstance(value, (list, tuple)) else [value])
        if path
    ]
    inside = [path for _, path in paths if not os.path.isabs(path) and '://' not in path]
    there = not root or Path(root).exists()
    if not there and (inside or not paths):
        yield 'data_root', root  # one line instead of one per option
    for option, path in paths:
        if path not in inside:
            yield option, path
        elif there:
            yield option, str(Path(root, path))
    if dataset.get('bbox_file'):
        yield 'bbox_file', str(dataset['bbox_file'])


def _is_remote(value: Any) -> bool:
    """Whether a dataset, or a step of its pipeline, reads through another backend."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_remote, value))
    if not isinstance(value, Mapping):
        return False
    for key in ('backend_args', 'file_client_args'):
        args = value.get(key)
        if isinstance(args, Mapping) and (
            args.get('backend', 'local') not in ('local', 'disk') or 'path_mapping' in args
        ):
            return True
    return any(map(_is_remote, value.values()))


def _is_left_alone(dataset: Mapping, cfg: Mapping) -> bool:
    """Whether a dataset downloads its files, or reads them in its own way."""
    if dataset.get('download'):
        return True
    kind = dataset.get('type')
    if isinstance(kind, str):
        scope = cfg.get('default_scope')
        try:
            kind = DATASETS.get(kind if '.' in kind or not scope else f'{scope}.{kind}')
        except (ImportError, AssertionError, KeyError):  # its framework is not installed
            return False
    if not isinstance(kind, type):
        return False
    methods = [getattr(kind, name, None) for name in ('__init__', '_join_prefix', 'load_data_list')]
    if any(getattr(m, '__module__', '').split('.')[0] not in FRAMEWORKS for m in methods):
        return True
    if 'download' in dataset:
        return False
    starts = (inspect.signature(base.__init__).parameters for base in kind.__mro__)
    return any('download' in names and names['download'].default is True for names in starts)

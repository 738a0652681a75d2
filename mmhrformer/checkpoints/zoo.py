"""The model zoo: published checkpoints, their sources and their files."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import yaml

from ..configs import config_root
from ..utils.suggest import did_you_mean
from .download import cache_folder, check_hash, download


@dataclass(frozen=True)
class Source:
    """One checkpoint of a model.

    Attributes:
        origin (str): Its publisher: ``'official'`` or ``'mmpose'``.
        link (str): Its URL.
        is_file (bool): Whether the link is a direct download. Others are sharing pages.
        is_whole (bool): Whether it holds the whole model or only the backbone.
        sha256 (str): Its SHA-256, or ``''`` if unknown.
    """

    origin: str
    link: str
    is_file: bool
    is_whole: bool
    sha256: str = ''

    def path(self, model: str) -> Path:
        """Path of the file in the cache, downloaded or not."""
        name = PurePosixPath(urlsplit(self.link).path).name if self.is_file else ''
        return cache_folder() / (name or f'{model}-{self.origin}.pth')


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo: a config and its published checkpoints.

    Attributes:
        name (str): Name of the config.
        config (Path): The config file.
        metadata (dict): Parameters, FLOPs and training data.
        results (list[dict]): Task, dataset, metrics and their source.
        sources (tuple[Source, ...]): Its checkpoints, best first; may be empty.
    """

    name: str
    config: Path
    metadata: dict
    results: list
    sources: tuple[Source, ...]

    @property
    def is_ablation(self) -> bool:
        """Whether it belongs to an ablation of the paper, rather than being a model to use."""
        return self.config.parent.name == 'ablations'


@cache
def read_zoo() -> dict[str, ZooModel]:
    """Read the metafiles of our configs.

    Returns:
        dict[str, ZooModel]: The models by name.
    """
    root = config_root()
    models = {}
    for metafile in sorted(root.glob('*/metafile.yml')):
        for entry in yaml.safe_load(metafile.read_text(encoding='utf-8'))['Models']:
            sources = [
                Source(
                    origin=source['From'],
                    link=source['Link'],
                    is_file=source['Kind'] == 'file',
                    is_whole=source['Holds'] == 'whole model',
                    sha256=source.get('SHA256', ''),
                )
                for source in entry.get('Sources', [])
            ]
            models[entry['Name']] = ZooModel(
                name=entry['Name'],
                config=root.parent / entry['Config'],
                metadata=entry['Metadata'],
                results=entry.get('Results', []),
                sources=tuple(sources),
            )
    return models


def list_models(pattern: str = '*') -> list[str]:
    """List the models of the zoo.

    Args:
        pattern (str): Pattern of names with the wildcard ``*``. Defaults to ``'*'``.

    Returns:
        list[str]: Names of the models, which are also those of their configs.

    Examples:
        >>> list_models('hrformer-tiny_*')
        ['hrformer-tiny_8xb128_in1k']
    """
    return sorted(fnmatch.filter(read_zoo(), pattern))


def find_model(name: str) -> ZooModel:
    """Find a model of the zoo.

    Args:
        name (str): Name of the model.

    Returns:
        ZooModel: The model.

    Raises:
        ValueError: If there is no such model; the message suggests similar names.
    """
    models = read_zoo()
    if name not in models:
        raise ValueError(
            f'there is no model {name!r} in the zoo: {did_you_mean(name, models)} '
            'mmhrformer.list_models() lists them'
        )
    return models[name]


def find_source(name: str, whole: bool = False) -> tuple[ZooModel, Source]:
    """Choose the checkpoint of a model.

    Args:
        name (str): Name of a model, optionally followed by ``@official`` or ``@mmpose``.
        whole (bool): Whether it must hold the whole model. Defaults to False.

    Returns:
        tuple[ZooModel, Source]: The model and its checkpoint: one that is already downloaded, or
        else the best.

    Raises:
        ValueError: If there is no such model, or no such checkpoint of it.
    """
    name, _, origin = name.partition('@')
    model = find_model(name)
    sources = [
        source
        for source in model.sources
        if source.origin == (origin or source.origin) and (source.is_whole or not whole)
    ]
    if not sources:
        known = ', '.join(f'{name}@{source.origin}' for source in model.sources)
        what = 'whole model' if whole else 'checkpoint'
        raise ValueError(
            f'no published {what} for {name}{"@" + origin if origin else ""}'
            + (f'; there is {known}' if known else ': train it, and pass the path of your file')
        )
    here = [source for source in sources if source.path(name).is_file()]
    return model, (here or sources)[0]


def find_file(name: str, whole: bool = False) -> tuple[Path, str]:
    """Find the file of a checkpoint in the cache, or download it there; see :func:`fetch`.

    Returns:
        tuple[Path, str]: The file, whose hash is verified only if it was just downloaded, and its
        SHA-256, empty if unknown.
    """
    model, source = find_source(name, whole)
    path = source.path(model.name)
    if not path.is_file():
        if not source.is_file:
            raise FileNotFoundError(
                f'the {source.origin} checkpoint of {model.name} is on a sharing page that '
                'programs cannot download from. Two steps:\n'
                f'  1. open {source.link} in a browser and download the file\n'
                f'  2. put it here: {path}\n'
                'From then on it is used without network access.'
            )
        download(source.link, path, source.sha256)
    return path, source.sha256


def fetch(name: str, whole: bool = False) -> Path:
    """Get a checkpoint of the zoo from the cache, or download it there.

    Args:
        name (str): As in :func:`find_source`.
        whole (bool): As in :func:`find_source`.

    Returns:
        Path: The file in :func:`cache_folder`, verified by its SHA-256 if known, or by the first
        digits in its name, if any.

    Raises:
        ValueError: If there is no such checkpoint.
        DownloadError: If it cannot be downloaded.
        FileNotFoundError: If it must be downloaded by hand; the message explains how.
    """
    path, sha256 = find_file(name, whole)
    check_hash(path, path.read_bytes(), sha256)
    return path

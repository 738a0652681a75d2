"""Models by name, and registration of our models in mmpretrain's hub."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import yaml
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from .checkpoints import list_models, load_checkpoint, read_zoo
from .checkpoints.contents import meta_of_checkpoint
from .checkpoints.loading import name_file_in_errors, read
from .configs import PACKAGES, find_framework, name_of, open_config
from .engine.dead_options import merge_options

__all__ = ['get_model', 'list_models', 'register_in_mmpretrain']


def get_model(
    name: str | Path | Config,
    pretrained: bool | str | Path = False,
    device: str = 'cpu',
    cfg_options: dict | None = None,
) -> nn.Module:
    """Build the model of a config, in evaluation mode.

    Args:
        name (str | Path | Config): Name of a model of the zoo (:func:`list_models`), path of a
            config with an HRFormer backbone, or the config itself.
        pretrained (bool | str | Path): Whether to load the published checkpoint of the whole
            model; or a checkpoint in any supported format: a path, or a name of the zoo such as
            ``NAME@official``. Defaults to False: random weights.
        device (str): Device of the model. Defaults to ``'cpu'``.
        cfg_options (dict, optional): Options of the config to override, by dotted name.

    Returns:
        nn.Module: The classifier, pose estimator or segmentor, with its config in ``model.cfg`` and
        the checkpoint's description of its training data (a dict) in ``model.dataset_meta``.

    Raises:
        FileNotFoundError: If there is no such config, or the checkpoint must be downloaded by hand.
        ImportError: If the framework of the model is not installed.
        RuntimeError: If the checkpoint does not fit the model.
        ValueError: If there is no such checkpoint or model, or an option has no effect.

    Examples:
        >>> model = get_model('hrformer-tiny_8xb128_in1k')  # doctest: +SKIP
    """
    cfg = copy.deepcopy(open_config(name))
    path, content = _read_weights(cfg, pretrained)  # fail before the model is built
    merge_options(cfg, cfg_options)
    model = _build(cfg)
    if pretrained:
        with name_file_in_errors(path):
            load_checkpoint(model, content, strict=True)
    model.to(device).train(False)  # mmpose's eval() returns nothing
    model.cfg, model.dataset_meta = cfg, meta_of_checkpoint(content)
    return model


def _read_weights(cfg: Config, pretrained: bool | str | Path) -> tuple[Path | None, dict]:
    """Path and content of the requested checkpoint, once the framework is known to be installed."""
    if cfg.get('default_scope') in PACKAGES:
        find_framework(cfg.default_scope)
    if not pretrained:
        return None, {}
    whole = pretrained is True
    return read(name_of(cfg) if whole else pretrained, whole)


def _build(cfg: Config) -> nn.Module:
    """Build the model of a config in its scope, for a single process."""
    for option in ('default_scope', 'model'):
        if option not in cfg:
            raise ValueError(
                f'name={cfg.filename!r}: this config has no {option}; pass one that can be '
                'trained, such as a name from mmhrformer.list_models()'
            )
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return revert_sync_batchnorm(MODELS.build(cfg.model))


def register_in_mmpretrain() -> list[str]:
    """Register our classifiers for ``mmpretrain.get_model`` and ``mmpretrain.list_models``.

    These are the models of ``list_models('*_in1k')``, ablations included. Their weights load
    through ``mmhrformer://``, so they are verified and converted.

    Returns:
        list[str]: The names now available in mmpretrain.

    Raises:
        ImportError: If mmpretrain is not installed.

    Examples:
        >>> register_in_mmpretrain()  # doctest: +SKIP
        ['hrformer-base_32xb32_in1k', 'hrformer-base_8xb128_in1k', ...]
    """
    from mmpretrain.apis import ModelHub

    zoo, entries = read_zoo(), []
    names = list_models('*_in1k')
    for name in names:
        model = zoo[name]
        entry = dict(Name=name, Config=str(model.config), Metadata=model.metadata)
        whole = [source.origin for source in model.sources if source.is_whole]
        if whole:
            entry['Weights'] = f'mmhrformer://{name}@{whole[0]}'
        if not ModelHub.has(name):
            entries.append(dict(entry, Results=model.results))
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder, 'model-index.yml')
        index.write_text(yaml.safe_dump(dict(Models=entries)), encoding='utf-8')
        ModelHub.register_model_index(index)
    return names

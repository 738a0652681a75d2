"""Predictions of trained models for images and videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..configs import open_config
from ..utils.suggest import did_you_mean
from .arguments import task_of
from .base import Inferencer
from .cls import ClsInferencer
from .media import open_media
from .pose import PoseInferencer
from .seg import SegInferencer

__all__ = [
    'ClsInferencer',
    'Inferencer',
    'PoseInferencer',
    'SegInferencer',
    'get_inferencer',
    'inference',
]
TASKS = dict(cls=ClsInferencer, pose=PoseInferencer, seg=SegInferencer)
BUILD_OPTIONS = (
    'task', 'device', 'dtype', 'fuse', 'cfg_options', 'show_progress',
    'detector', 'detector_weights', 'detector_threshold',
)  # fmt: skip


def get_inferencer(
    model: str | Path | Config,
    checkpoint: bool | str | Path = True,
    task: str | None = None,
    **kwargs: Any,
) -> Inferencer:
    """Build the inferencer of a model.

    Args:
        model (str | Path | Config): As for :class:`Inferencer`.
        checkpoint (bool | str | Path): As for :class:`Inferencer`. Defaults to True.
        task (str, optional): ``'cls'``, ``'pose'`` or ``'seg'``; it is an error if the model has
            another task. Defaults to None: the task of the model.
        **kwargs: Further arguments of :class:`ClsInferencer`, :class:`PoseInferencer` or
            :class:`SegInferencer`.

    Returns:
        Inferencer: The inferencer, to be called with images or a video.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        ImportError: If the framework of the task is not installed.
        RuntimeError: If the checkpoint does not match the model.
        ValueError: If an argument is invalid; the message names the valid ones.

    Examples:
        >>> segment = get_inferencer('my_config.py', 'my.pth', device='cuda')  # doctest: +SKIP
        >>> segment('folder', batch_size=4, out_dir='found')['files']  # doctest: +SKIP
        ['found/visualizations/a.jpg', 'found/predictions/a.png', 'found/predictions/a.json']
    """
    if task is not None and task not in TASKS:
        hint = did_you_mean(str(task), TASKS)
        raise ValueError(f'task={task!r}: choose one of {list(TASKS)}. {hint}'.rstrip())
    config = open_config(model)
    return TASKS[task or task_of(config)](config, checkpoint, **kwargs)


def inference(
    model: str | Path | Config,
    inputs: object,
    checkpoint: bool | str | Path = True,
    **kwargs: Any,
) -> dict:
    """Run a model on images or a video, in one line.

    Args:
        model (str | Path | Config): As for :class:`Inferencer`.
        inputs (str | Path | np.ndarray | Sequence): As for :func:`open_media`.
        checkpoint (bool | str | Path): As for :class:`Inferencer`. Defaults to True.
        **kwargs: Arguments of :func:`get_inferencer` and of :meth:`Inferencer.__call__`.

    Returns:
        dict: As :meth:`Inferencer.__call__`.

    Raises:
        FileNotFoundError: If there is no such config, checkpoint or input.
        ImportError: If the framework of the task is not installed.
        RuntimeError: If the checkpoint does not match the model.
        TypeError: If the inputs are of an unsupported type.
        ValueError: If an argument is invalid; the message names the valid ones.

    Examples:
        >>> name = 'td-hm_hrformer-small_8xb32-210e_coco-256x192'
        >>> inference(name, 'people.jpg', detector=True, out_dir='found')  # doctest: +SKIP
    """
    media = open_media(inputs)  # before a model is built
    options = {name: kwargs.pop(name) for name in BUILD_OPTIONS if name in kwargs}
    return get_inferencer(model, checkpoint, **options)(media, **kwargs)

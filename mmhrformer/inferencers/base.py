"""The base class of inferencers: inputs, batches, precision, progress, results.

Models, data preparation and visualizers are those of mmpretrain, mmpose and mmsegmentation.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, repeat
from math import ceil
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import VISUALIZERS, DefaultScope
from mmengine.visualization import Visualizer
from rich.progress import track
from torch import nn

from ..configs import open_config
from ..datasets.meta import wrapped_dataset
from ..deploy.exported import run_exported
from ..deploy.fuse import fuse_for_inference
from ..hub import get_model
from .arguments import (
    TASKS,
    check_batch_size,
    check_checkpoint,
    check_device,
    check_draw_options,
    check_dtype,
    check_exported,
    refuse_tta,
    task_of,
)
from .image_loading import Loader, displayable, split_pipeline
from .media import Media, Picture, Video, open_media, reason
from .writer import Result, Writer

Boxes = Iterable[np.ndarray | None]  # one per image


class Inferencer:
    """Predictions for images and videos, as plain Python objects and as pictures.

    Base class of :class:`ClsInferencer`, :class:`PoseInferencer` and :class:`SegInferencer`.

    Args:
        model (str | Path | Config): Name of a model of the zoo, path of a config, or a config.
        checkpoint (bool | str | Path): The weights: True for the published ones, a file in any
            supported format, ``mmhrformer://NAME`` or a name of the zoo; False for random weights.
            An exported ``.onnx`` file is run by onnxruntime, on the CPU. Defaults to True.
        device (str, optional): A device such as ``'cpu'`` or ``'cuda:0'``. Defaults to None: the
            best one available.
        dtype (str): ``'float32'``, or ``'bfloat16'`` or ``'float16'`` for the backbone and neck
            by autocast; heads always run in float32. Defaults to ``'float32'``.
        fuse (bool): Whether to fold the model, see :func:`fuse_for_inference`. Defaults to False.
        cfg_options (dict, optional): Options of the config to override, by dotted name.
        show_progress (bool): Whether to show a progress bar for more than one batch. Defaults to
            True.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        ImportError: If the framework of the task is not installed.
        RuntimeError: If the checkpoint does not match the model.
        ValueError: If an argument is invalid; the message names the valid ones.
    """

    scope = ''
    visualizer_type = ''
    draw_options: tuple[str, ...] = ()
    collate = staticmethod(pseudo_collate)

    def __init__(
        self,
        model: str | Path | Config,
        checkpoint: bool | str | Path = True,
        device: str | None = None,
        dtype: str = 'float32',
        fuse: bool = False,
        cfg_options: dict | None = None,
        show_progress: bool = True,
    ) -> None:
        exported = str(checkpoint).endswith('.onnx')
        if exported:
            device = check_exported(device, dtype, fuse)
        self.device = check_device(device)
        self.autocast = check_dtype(dtype, self.device)
        self.show_progress = show_progress
        config = open_config(model)
        if task_of(config) != TASKS[self.scope]:
            raise ValueError(
                f'model={config.filename!r} is for task={task_of(config)!r}, not '
                f'{TASKS[self.scope]!r}: change the task or the model'
            )
        check_checkpoint(config, checkpoint)
        refuse_tta(config)
        built = get_model(config, not exported and checkpoint, cfg_options=cfg_options)
        built = run_exported(built, checkpoint) if exported else built
        self.cfg = built.cfg
        with DefaultScope.overwrite_default_scope(self.scope):
            self.loader, self.pipeline = build_pipeline(self.cfg)
            self.dataset_meta = self._dataset_meta(built.dataset_meta)
            self.visualizer = self._build_visualizer()
        built = built.to(self.device)  # before folding, which depends on the device
        self.model = fuse_for_inference(built) if fuse else built
        self.model.dataset_meta = self.dataset_meta

    def __call__(
        self,
        inputs: object,
        batch_size: int = 1,
        boxes: object = None,
        out_dir: str | Path | None = None,
        return_vis: bool = False,
        return_datasamples: bool = False,
        **draw: Any,
    ) -> dict:
        """Predict for images or a video.

        Args:
            inputs (str | Path | np.ndarray | Sequence): See :func:`open_media`.
            batch_size (int): Images (for pose: people) per batch. Defaults to 1.
            boxes (np.ndarray | Sequence, optional): See :class:`PoseInferencer`.
            out_dir (str | Path, optional): See :class:`Writer`. Defaults to None: no files.
            return_vis (bool): Whether to return drawn pictures, RGB. Defaults to False.
            return_datasamples (bool): Whether to return data samples. Defaults to False.
            **draw: Drawing options of the task, such as ``radius`` or ``opacity``.

        Returns:
            dict: The lists ``predictions`` (if one of several images fails, its ``error``),
            ``visualization``, ``data_samples`` and ``files``.

        Raises:
            FileNotFoundError: If there is no such file, or no image in the folder.
            TypeError: If the inputs are of an unsupported type.
            ValueError: If an argument is invalid, or no image can be read.
        """
        media = open_media(inputs)
        boxes = self._check_call(media, batch_size, boxes, draw)
        with Writer(out_dir, media) as writer:
            options = draw if return_vis or out_dir is not None else None
            results = self._results(media, batch_size, boxes, options)
            found = collect(results, writer, return_vis, return_datasamples)
        return dict(found, files=writer.files)

    def prepare(self, picture: Picture, boxes: np.ndarray | None = None) -> list[dict]:
        """Load an image and run the test pipeline on it.

        Args:
            picture (Picture): The image.
            boxes (np.ndarray, optional): (N, 4) boxes of people, for pose.

        Returns:
            list[dict]: ``inputs``, a (C, H, W) tensor, usually uint8 in BGR, and ``data_samples``:
            one for the image or, for pose, one per person.

        Raises:
            ValueError: If the test pipeline cannot read the image.
        """
        return self._transform(picture, self.loader.load(picture), boxes)

    @torch.no_grad()
    def forward(self, items: Sequence[dict]) -> list:
        """Run the model on a batch.

        Args:
            items (Sequence[dict]): Outputs of :meth:`prepare`, all of one size.

        Returns:
            list: One data sample per item, on the CPU.
        """
        scope = DefaultScope.overwrite_default_scope(self.scope)
        with scope, autocast_features(self.model, self.device, self.autocast):
            samples = self.model.test_step(self.collate(list(items)))
        return [sample.cpu() for sample in samples]

    def _check_call(self, media: Media, batch_size: int, boxes: object, draw: dict) -> Boxes:
        """Validate the arguments of a call; return the boxes of each image."""
        check_batch_size(batch_size)
        check_draw_options(draw, self.draw_options)
        for picture in [] if isinstance(media, Video) else media:
            if isinstance(picture.source, np.ndarray) and not picture.is_frame:
                try:
                    self.loader.take(picture.source)
                except ValueError as err:
                    raise ValueError(f'inputs: {picture.name}: {err}') from err
        return self._boxes_for(media, boxes)

    def _results(
        self, media: Media, batch_size: int, boxes: Boxes, draw: dict | None
    ) -> Iterator[Result]:
        """Yield the result of each image; if one of several fails, its error is the prediction."""
        total, failed = 0, []
        for picture, result in self._predict(media, batch_size, boxes, draw):
            if isinstance(result, Exception):
                message = f'{picture.name}: {reason(result)}'
                if isinstance(media, Video) or len(media) == 1:
                    kind = ValueError if isinstance(result, ValueError) else RuntimeError
                    raise kind(f'inputs: {message}') from result
                warnings.warn(f'{message}; skipped', stacklevel=3)
                failed.append(message)
                result = Result(picture, dict(input=picture.name, error=reason(result)))
            total += 1
            yield result
        if failed and len(failed) == total:
            raise ValueError(
                f'inputs: none of the {total} images could be read; the first one: {failed[0]}'
            )

    def _predict(
        self, media: Media, batch_size: int, boxes: Boxes, draw: dict | None
    ) -> Iterator[tuple[Picture, Result | Exception]]:
        """Yield each image with its result or error."""
        inputs, total = zip(media, boxes), ceil(len(media) / batch_size)
        batches = iter(lambda: list(islice(inputs, batch_size)), [])
        hidden = not self.show_progress or total < 2
        for batch in track(batches, 'Inference', total=total, disable=hidden):
            loaded = [attempt(self._load, *one) for one in batch]
            items = [item for one in loaded if not isinstance(one, Exception) for item in one[1]]
            samples = iter(self._run(items, batch_size))
            for (picture, _), one in zip(batch, loaded):
                if not isinstance(one, Exception):
                    pixels, own = one[0], list(islice(samples, len(one[1])))
                    one = attempt(self._result, picture, pixels, own, draw)
                yield picture, one

    def _result(
        self, picture: Picture, pixels: np.ndarray, samples: list, draw: dict | None
    ) -> Result:
        """Merge the data samples of an image, describe and draw them."""
        for sample in samples:
            if isinstance(sample, Exception):
                raise sample
        sample = self._merge(picture, samples)
        prediction, drawn = dict(input=picture.name, **self._to_plain(sample)), None
        if draw is not None:
            rgb = np.ascontiguousarray(displayable(pixels)[..., ::-1])
            drawn = self._draw(rgb, sample, **draw)
        return Result(picture, prediction, sample, drawn, self._labels(sample))

    def _load(self, picture: Picture, boxes: np.ndarray | None) -> tuple[np.ndarray, list[dict]]:
        pixels = self.loader.load(picture)
        return pixels, self._transform(picture, pixels, boxes)

    def _transform(
        self, picture: Picture, pixels: np.ndarray, boxes: np.ndarray | None
    ) -> list[dict]:
        """Run the test pipeline after its loading step, once per input of the model."""
        size = pixels.shape[:2]
        loaded = dict(img=pixels, img_path=picture.name, img_shape=size, ori_shape=size)
        with DefaultScope.overwrite_default_scope(self.scope):
            try:
                return [self.pipeline(start) for start in self._split(loaded, boxes)]
            except TypeError as err:
                if pixels.dtype in (np.uint8, np.float32):
                    raise
                raise ValueError(
                    f'its data type is {pixels.dtype} ({err}). Set to_float32=True in the loading '
                    'step of the test pipeline'
                ) from err

    def _run(self, items: Sequence[dict], batch_size: int) -> list:
        """Run the model in batches of equal size; return data samples or errors."""
        groups = defaultdict(list)
        for i, item in enumerate(items):
            groups[self._size(item)].append(i)
        samples = [None] * len(items)
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                part = group[start : start + batch_size]
                found = attempt(self.forward, [items[i] for i in part])
                for number, i in enumerate(part):
                    samples[i] = found if isinstance(found, Exception) else found[number]
        return samples

    def _build_visualizer(self) -> Visualizer:
        options = self.cfg.get('visualizer') or dict(type=self.visualizer_type)
        # A unique name, since mmengine shares visualizers; no backends, since we write the files.
        return VISUALIZERS.build(dict(options, name=str(uuid4()), vis_backends=None))

    # Tasks override these, and define _dataset_meta, _to_plain and _draw.

    def _boxes_for(self, media: Media, boxes: object) -> Boxes:
        if boxes is not None:
            raise ValueError(
                f'boxes: {type(self).__name__} takes whole images; remove boxes, or use a pose '
                'model'
            )
        return repeat(None)

    def _split(self, loaded: dict, boxes: np.ndarray | None) -> list[dict]:
        return [loaded]

    def _size(self, item: dict) -> tuple:
        return tuple(item['inputs'].shape)

    def _merge(self, picture: Picture, samples: list) -> Any:
        return samples[0]

    def _labels(self, sample: Any) -> np.ndarray | None:
        return None


def collect(
    results: Iterable[Result], writer: Writer, return_vis: bool, return_datasamples: bool
) -> dict:
    """Write results, and keep only what was requested, since a long video would fill the memory."""
    found = dict(predictions=[], visualization=[], data_samples=[])
    for result in results:
        writer.add(result)
        found['predictions'].append(result.prediction)
        if return_vis:
            found['visualization'].append(result.drawn)
        if return_datasamples:
            found['data_samples'].append(result.sample)
    return found


def attempt(function: Callable, *args: Any) -> Any:
    """Return the result of a call, or the error that it raised."""
    try:
        return function(*args)
    except Exception as err:  # a single image must not stop the others
        return err


def build_pipeline(cfg: Config) -> tuple[Loader, Any]:
    """Build the test pipeline of a config, see :func:`split_pipeline`; unwrap its dataset."""
    dataset = wrapped_dataset(cfg, 'pipeline')
    if 'pipeline' not in dataset:
        raise ValueError(
            'model: the config has no test_dataloader.dataset.pipeline, which prepares images; '
            'add it'
        )
    cfg.test_dataloader.dataset = dataset
    return split_pipeline(dataset.pipeline)


@contextmanager
def autocast_features(
    model: nn.Module, device: torch.device, dtype: torch.dtype | None
) -> Iterator[None]:
    """Run backbone and neck under autocast, but pass float32 features to the heads.

    Heads use NumPy, which has no bfloat16, and determine coordinates and classes. The model is
    restored afterwards; with ``dtype=None`` everything runs in float32.
    """
    if dtype is None:
        yield
        return
    extract = model.extract_feat

    def extract_feat(*args, **kwargs):
        with torch.autocast(device.type, dtype):
            features = extract(*args, **kwargs)
        if isinstance(features, torch.Tensor):
            return features.float()
        return type(features)(feature.float() for feature in features)

    model.extract_feat = extract_feat
    try:
        yield
    finally:
        del model.extract_feat

"""From an image to what is in it, in one line: inferencers for the three tasks.

They are made of the stock inferencers of mmpose, mmsegmentation and mmpretrain: those prepare the
images, run the models and draw. What is added here is the same for all tasks: what can be given,
batches, precision, progress, files, and plain results.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from rich.progress import track
from torch import nn

from ..checkpoints import read_zoo
from ..checkpoints.loading import locate
from ..configs import PACKAGES, name_of, open_config
from ..datasets.meta import find_classes, make_palette
from ..deploy.fuse import fuse_for_inference
from ..hub import get_model
from ..utils.suggest import did_you_mean
from .arguments import check_box_array, check_device, check_draw_options, check_dtype, check_whole
from .image_loading import displayable, reason, split_pipeline
from .media import Picture, Video, Writer, open_media

PERSON = 0  # the category of people in detectors trained on COCO
# What the stock inferencers do with pictures themselves, which is done here for all tasks.
DONE_HERE = {'show', 'wait_time', 'return_vis', 'vis_out_dir', 'img_out_dir', 'show_dir'}
# Maps of another size than the picture do not go with ``min_side``.
NOT_OFFERED = {'draw_heatmap', 'resize', 'rescale_factor'}


class Inferencer:
    """Finds what is in images and videos, and draws it. The base of the three tasks.

    Args:
        model (str | Path | Config): Name of a model of the zoo, path of a config, or a config.
        checkpoint (bool | str | Path): The weights, as ``pretrained`` of :func:`get_model`: True
            for the published ones, a file of any dialect, ``mmhrformer://NAME`` or a name of the
            zoo; False leaves random ones. Defaults to True.
        device (str, optional): Where to compute, such as ``'cpu'`` or ``'cuda:0'``. Defaults to
            None: the best that there is.
        dtype (str): ``'float32'``, or ``'bfloat16'`` or ``'float16'`` for the backbone and neck
            by autocast; heads compute in float32 in any case. Defaults to ``'float32'``.
        fuse (bool): Whether to fold the model, see :func:`fuse_for_inference`. Defaults to False.
        cfg_options (dict, optional): Options of the config to change, by dotted name.
        show_progress (bool): Whether to show a progress bar when there is more than one batch.
            Defaults to True.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        ImportError: If the framework of the task is not installed.
        RuntimeError: If the checkpoint does not fit the model.
        ValueError: If an argument is not possible; the message tells what is.
    """

    scope = ''

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
        self.device = check_device(device)
        self.autocast = check_dtype(dtype, self.device)
        self.show_progress = show_progress
        config = open_config(model)
        check_scope(config, self.scope)
        weights = find_weights(config, checkpoint)
        built = get_model(config, weights or False, cfg_options=cfg_options)
        self.cfg = prepare_config(built.cfg)
        with DefaultScope.overwrite_default_scope(self.scope):
            self.loader, self.pipeline = split_pipeline(self.cfg.test_dataloader.dataset.pipeline)
            self.dataset_meta = self._dataset_meta(built.dataset_meta)
            built = fuse_for_inference(built) if fuse else built
            self.stock = self._stock_inferencer(built.to(self.device))
        self.model = self.stock.model
        self.draw_options = self.stock.visualize_kwargs - DONE_HERE - NOT_OFFERED

    def __call__(
        self,
        inputs: object,
        batch_size: int = 1,
        boxes: object = None,
        out_dir: str | Path | None = None,
        return_vis: bool = False,
        return_datasamples: bool = False,
        min_side: int = 0,
        **draw: Any,
    ) -> dict:
        """Find what is in images or a video.

        Args:
            inputs (str | Path | np.ndarray | Sequence): An image: path, address (http, https), or
                array as the loading step of the config's test pipeline gives it, usually (H, W, 3)
                uint8 in BGR; a list of these; a folder; a video: path, address or stream.
            batch_size (int): Images, for pose people, to compute at a time. Defaults to 1.
            boxes (np.ndarray | Sequence, optional): For pose, the people: (N, 4) of left, top,
                right, bottom in pixels, for every image, or a list of such, one for each image.
                Defaults to None: the detector, or the whole image.
            out_dir (str | Path, optional): Folder to write pictures and predictions to, image by
                image: ``visualizations/*.jpg`` or ``*.mp4``, ``predictions/*.json`` and, for
                segmentation, ``predictions/*.png``. Defaults to None: nothing is written.
            return_vis (bool): Whether to return drawn pictures. Defaults to False.
            return_datasamples (bool): Whether to return the data samples of the framework, too.
                Defaults to False.
            min_side (int): Pictures whose shorter side has fewer pixels are enlarged by a whole
                factor before drawing. Defaults to 0: none.
            **draw: Options of the stock inferencer's ``visualize``, such as ``radius`` and
                ``kpt_thr`` for pose or ``opacity`` for segmentation.

        Returns:
            dict: ``predictions``: a dict of plain Python for each image or frame, ready for JSON;
            ``visualization`` and ``data_samples``: lists, empty unless asked for; ``files``: what
            was written. Of an image that could not be read or computed, among others, the
            prediction is ``dict(input=..., error=...)``, its data sample and picture are None; a
            warning names it.

        Raises:
            FileNotFoundError: If there is no such file, or no image in the folder.
            TypeError: If the inputs are nothing to look at.
            ValueError: If an argument is not possible, or nothing can be read.
        """
        media = open_media(inputs)
        pictures = media.pictures(self.loader)
        check_whole('batch_size', batch_size, 1)
        check_whole('min_side', min_side, 0)
        check_draw_options(draw, self.draw_options)
        boxes = self._check_boxes(boxes, media)
        result = dict(predictions=[], visualization=[], data_samples=[])
        with Writer(out_dir, media) as writer:
            total = ceil(len(media) / batch_size)
            for picture, sample in self._predict(pictures, batch_size, total, boxes):
                prediction, drawn = dict(input=picture.name), None
                try:
                    if isinstance(sample, Exception):
                        raise sample
                    prediction.update(self._to_plain(sample))
                    if return_vis or out_dir is not None:
                        drawn = self._draw(*self._enlarge(picture.pixels, sample, min_side), draw)
                except Exception as err:  # whatever a single image lets happen
                    if isinstance(media, Video) or len(media) == 1:
                        kind = ValueError if isinstance(err, ValueError) else RuntimeError
                        raise kind(f'inputs: {picture.name}: {reason(err)}') from err
                    warnings.warn(f'{picture.name}: {reason(err)}; left out', stacklevel=2)
                    prediction, sample = dict(input=picture.name, error=reason(err)), None
                writer.add(picture, prediction, drawn, self._labels(sample))
                result['predictions'].append(prediction)
                if return_vis:
                    result['visualization'].append(drawn)
                if return_datasamples:
                    result['data_samples'].append(sample)
        failed = [one for one in result['predictions'] if 'error' in one]
        if failed and len(failed) == len(result['predictions']):
            raise ValueError(
                f'inputs: none of the {len(failed)} images could be read, from '
                f'{failed[0]["input"]!r} on: {failed[0]["error"]}'
            )
        return dict(result, files=writer.files)

    def prepare(self, picture: Picture, boxes: np.ndarray | None = None) -> list[dict]:
        """Bring an image into the form the model takes.

        Args:
            picture (Picture): The image.
            boxes (np.ndarray, optional): (N, 4) boxes of people, for pose.

        Returns:
            list[dict]: ``inputs``, a (C, H, W) tensor, usually uint8 in BGR, and ``data_samples``:
            one for the image or, for pose, one for each person.

        Raises:
            ValueError: If the image cannot be read as the config says.
        """
        loaded = self._load(picture)
        with DefaultScope.overwrite_default_scope(self.scope):
            try:
                return [self.pipeline(start) for start in self._starts(loaded, boxes)]
            except TypeError as err:
                depth = loaded['img'].dtype
                if depth in (np.uint8, np.float32):
                    raise
                raise ValueError(
                    f'it is of {depth} ({err}). Set to_float32=True in the loading step of the '
                    'test pipeline'
                ) from err

    def _load(self, picture: Picture) -> dict:
        """What the loading step of the test pipeline hands on."""
        picture = picture.loaded_by(self.loader)
        if picture.error:
            raise ValueError(picture.error)
        size = picture.pixels.shape[:2]
        path = picture.file if isinstance(picture.file, Path) else f'{picture.stem}.jpg'
        return dict(img=picture.pixels, img_path=str(path), img_shape=size, ori_shape=size)

    def _starts(self, loaded: dict, boxes: np.ndarray | None) -> list[dict]:
        """What the rest of the pipeline begins with."""
        return [loaded]

    @torch.no_grad()
    def forward(self, items: Sequence[dict]) -> list:
        """Run the model on what :meth:`prepare` gave; all of one size.

        Args:
            items (Sequence[dict]): The inputs.

        Returns:
            list: A data sample for each, on the CPU.
        """
        scope = DefaultScope.overwrite_default_scope(self.scope)
        with scope, features_in(self.model, self.device, self.autocast):
            samples = self.model.test_step(self._collate(list(items)))
        return [sample.cpu() for sample in samples]

    def _predict(
        self, pictures: Iterator[Picture], batch_size: int, total: int, boxes: Callable
    ) -> Iterator[tuple]:
        """Give each image and its data sample, or the error that it has met with."""
        number = 0
        batches = iter(lambda: list(islice(pictures, batch_size)), [])
        hidden = not self.show_progress or total < 2
        for batch in track(batches, 'Inference', total=total, disable=hidden):
            items, owners, errors = [], [], {}
            for i, picture in enumerate(batch):
                try:
                    own = self.prepare(picture, boxes(number + i))
                    items, owners = items + own, owners + [i] * len(own)
                except Exception as err:  # whatever a single image lets happen
                    errors[i] = err
            samples = self._run(items, batch_size)
            for i, picture in enumerate(batch):
                mine = [sample for sample, owner in zip(samples, owners) if owner == i]
                failed = [one for one in [errors.get(i), *mine] if isinstance(one, Exception)]
                yield picture, failed[0] if failed else self._merge(picture, mine)
            number += len(batch)

    def _run(self, items: Sequence[dict], batch_size: int) -> list:
        """Run the model in batches of one size each; images of a folder may differ.

        Returns:
            list: The data sample of each item, or the error of its batch.
        """
        groups = defaultdict(list)
        for i, item in enumerate(items):
            groups[self._size(item)].append(i)
        samples = [None] * len(items)
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                part = group[start : start + batch_size]
                try:
                    found = self.forward([items[i] for i in part])
                except Exception as err:
                    found = [err] * len(part)
                for i, sample in zip(part, found):
                    samples[i] = sample
        return samples

    def _with_model(self, stock: type, model: nn.Module, **kwargs: Any) -> Any:
        """Build a stock inferencer around the model and pipeline that are built already."""
        parts = dict(
            _init_model=lambda stock, *args: model, _init_pipeline=lambda stock, cfg: self.pipeline
        )
        return type(stock.__name__, (stock,), parts)(self.cfg, **kwargs)

    def _check_boxes(self, boxes: object, media: Sequence) -> Callable[[int], np.ndarray | None]:
        if boxes is not None:
            raise ValueError(
                f'boxes: {type(self).__name__} looks at whole images; leave boxes out, or give a '
                'pose model'
            )
        return lambda number: None

    def _collate(self, items: list[dict]) -> dict:
        return self.stock.collate_fn(items)

    def _size(self, item: dict) -> tuple:
        return tuple(item['inputs'].shape)

    def _merge(self, picture: Picture, samples: list) -> Any:
        return samples[0]

    def _labels(self, sample: Any) -> np.ndarray | None:
        return None

    def _enlarge(self, pixels: np.ndarray, sample: Any, min_side: int) -> tuple:
        """The picture (RGB) and its data sample, enlarged if they are small."""
        factor = max(1, ceil(min_side / min(pixels.shape[:2])))
        rgb = np.ascontiguousarray(displayable(pixels)[..., ::-1])
        if factor == 1:
            return rgb, sample
        rgb = cv2.resize(rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
        return rgb, self._enlarge_sample(sample, factor)

    def _enlarge_sample(self, sample: Any, factor: int) -> Any:
        return sample


class ClsInferencer(Inferencer):
    """Classifies images, by mmpretrain. The arguments are those of :class:`Inferencer`.

    A prediction has ``pred_label``, ``pred_score``, ``pred_scores`` of all classes and, where names
    are known from the config or the checkpoint, ``pred_class``.

    Examples:
        >>> classify = ClsInferencer('hrformer-tiny_8xb128_in1k')  # doctest: +SKIP
        >>> classify('dog.jpg')['predictions'][0]['pred_class']  # doctest: +SKIP
        'golden retriever'
    """

    scope = 'mmpretrain'

    def _dataset_meta(self, told: dict) -> dict:
        return dict(classes=find_classes(self.cfg, self.cfg.model.head.num_classes, told)[0])

    def _stock_inferencer(self, model: nn.Module) -> Any:
        from mmpretrain import ImageClassificationInferencer
        from mmpretrain.visualization import UniversalVisualizer

        model._config = self.cfg
        stock = ImageClassificationInferencer(
            model, pretrained=False, device=None, classes=self.dataset_meta['classes']
        )
        stock.visualizer = UniversalVisualizer()
        return stock

    def _collate(self, items: list[dict]) -> dict:
        from mmengine.dataset import default_collate  # as the stock inferencer does

        return default_collate(items)

    def _to_plain(self, sample: Any) -> dict:
        (result,) = self.stock.postprocess([sample], None)
        return dict(result, pred_scores=result['pred_scores'].tolist())

    def _draw(self, image: np.ndarray, sample: Any, options: dict) -> np.ndarray:
        # Stock `visualize` draws only what it may show or write.
        visualizer = self.stock.visualizer
        classes = self.dataset_meta['classes']
        return visualizer.visualize_cls(image, sample, classes, draw_gt=False, **options)


class SegInferencer(Inferencer):
    """Finds the class of each pixel, by mmsegmentation; arguments of :class:`Inferencer`.

    A prediction has ``size``, height and width; ``areas``, the share of the image that each class
    has, largest first; ``runs``, the labels row by row as pairs of label and number of pixels:
    :meth:`label_map` makes an array of them.

    Examples:
        >>> name = 'ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024'
        >>> segment = SegInferencer(name, 'trained.pth')  # doctest: +SKIP
        >>> prediction = segment('street.jpg')['predictions'][0]  # doctest: +SKIP
        >>> prediction['areas']['road']  # doctest: +SKIP
        0.32
        >>> segment.label_map(prediction).shape  # doctest: +SKIP
        (1024, 2048)
    """

    scope = 'mmseg'

    def _dataset_meta(self, told: dict) -> dict:
        head = self.cfg.model.decode_head
        num_classes = (head[-1] if isinstance(head, (list, tuple)) else head).num_classes
        classes, palette = find_classes(self.cfg, num_classes, told)
        classes = classes or tuple(f'class {i}' for i in range(num_classes))
        palette = palette or make_palette(num_classes)
        if num_classes == 1:  # label 1; what is not of the class has label 0
            classes, palette = ('background', *classes), [[0, 0, 0], *palette]
        return dict(classes=classes, palette=palette)

    def _stock_inferencer(self, model: nn.Module) -> Any:
        from mmseg.apis import MMSegInferencer

        model.dataset_meta = self.dataset_meta
        self.cfg.setdefault('visualizer', dict(type='SegLocalVisualizer'))
        return self._with_model(MMSegInferencer, model, device='cpu', **self.dataset_meta)

    def _size(self, item: dict) -> tuple:
        # Logits of a batch are brought to one original size.
        return (*super()._size(item), *item['data_samples'].ori_shape)

    @staticmethod
    def label_map(prediction: Mapping) -> np.ndarray:
        """Unpack the labels of a prediction.

        Args:
            prediction (Mapping): One of the ``predictions``, perhaps read from its JSON file.

        Returns:
            np.ndarray: The label of each pixel, (H, W) uint8.

        Examples:
            >>> SegInferencer.label_map(dict(size=[2, 3], runs=[[0, 4], [7, 2]]))
            array([[0, 0, 0],
                   [0, 7, 7]], dtype=uint8)
        """
        labels, lengths = np.array(prediction['runs']).T
        return np.repeat(labels.astype(np.uint8), lengths).reshape(prediction['size'])

    def _labels(self, sample: Any) -> np.ndarray | None:
        return None if sample is None else sample.pred_sem_seg.data[0].numpy().astype(np.uint8)

    def _to_plain(self, sample: Any) -> dict:
        labels = self._labels(sample)
        flat, classes = labels.ravel(), self.dataset_meta['classes']
        starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
        lengths = np.diff(starts, append=flat.size)
        counts = np.bincount(flat, minlength=len(classes))
        order = [i for i in counts.argsort()[::-1] if counts[i]]
        return dict(
            size=list(labels.shape),
            areas={classes[i]: float(counts[i] / flat.size) for i in order},
            runs=np.stack([flat[starts], lengths], 1).tolist(),
        )

    def _enlarge_sample(self, sample: Any, factor: int) -> Any:
        labels = sample.pred_sem_seg.data
        labels = labels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        return type(sample)(pred_sem_seg=type(sample.pred_sem_seg)(data=labels))

    def _draw(self, image: np.ndarray, sample: Any, options: dict) -> np.ndarray:
        return self.stock.visualize([image], [sample], return_vis=True, **options)[0]


class PoseInferencer(Inferencer):
    """Finds the joints of people, by mmpose.

    A prediction has ``instances``, one for each person: ``keypoints``, ``keypoint_scores``,
    ``bbox`` and ``bbox_score``.

    Args:
        *args: As :class:`Inferencer`.
        detector (bool | str): What finds the people: True for the detector that mmpose uses, or
            name or config of another model of mmdet. Defaults to False: boxes are given with the
            images, else a person fills the image.
        detector_weights (str, optional): Checkpoint of the detector. Defaults to None: the
            published one.
        detector_threshold (float): Least score of a person. Defaults to 0.3.
        **kwargs: As :class:`Inferencer`.

    Raises:
        ImportError: If a detector is wanted and mmdet is not installed.

    Examples:
        >>> name = 'td-hm_hrformer-small_8xb32-210e_coco-256x192'
        >>> find_joints = PoseInferencer(name)  # doctest: +SKIP
        >>> result = find_joints('people.jpg', boxes=[[10, 20, 110, 320]])  # doctest: +SKIP
        >>> len(result['predictions'][0]['instances'][0]['keypoints'])  # doctest: +SKIP
        17
    """

    scope = 'mmpose'

    def __init__(
        self,
        *args: Any,
        detector: bool | str = False,
        detector_weights: str | None = None,
        detector_threshold: float = 0.3,
        **kwargs: Any,
    ) -> None:
        if detector_weights and not detector:
            raise ValueError(
                f'detector_weights={detector_weights!r} without a detector: give detector, too'
            )
        super().__init__(*args, **kwargs)
        self.detector_threshold = detector_threshold
        self.detector = None
        if detector:
            self.detector = build_detector(detector, detector_weights, self.device)

    def _dataset_meta(self, told: dict) -> dict:
        from mmpose.apis.inference import dataset_meta_from_config

        meta = dataset_meta_from_config(self.cfg, 'test')
        if meta is None:
            raise ValueError(
                'the config tells no joints: set metainfo of test_dataloader.dataset, as in '
                "metainfo=dict(from_file='configs/_base_/datasets/coco.py')"
            )
        return meta

    def _stock_inferencer(self, model: nn.Module) -> Any:
        from mmpose.apis import Pose2DInferencer

        if self.cfg.model.type.split('.')[-1] != 'TopdownPoseEstimator':
            raise ValueError(
                f'model.type={self.cfg.model.type!r}: PoseInferencer is for models that look at '
                "one person at a time, 'TopdownPoseEstimator'"
            )
        model.dataset_meta = self.dataset_meta
        # The stock class wants these on top of the config, where only mmpose's own have them.
        self.cfg.data_mode = 'topdown'
        self.cfg.dataset_type = self.cfg.test_dataloader.dataset.type
        self.cfg.setdefault('visualizer', dict(type='PoseLocalVisualizer'))
        return self._with_model(Pose2DInferencer, model, det_model='whole_image')

    def _starts(self, loaded: dict, boxes: np.ndarray | None) -> list[dict]:
        image, scores = loaded['img'], None
        if boxes is None and self.detector is not None:
            boxes, scores = self._detect(image)
        elif boxes is None:
            boxes = np.array([[0, 0, image.shape[1], image.shape[0]]], np.float32)
        scores = np.ones(len(boxes), np.float32) if scores is None else scores
        start = dict(loaded, **self.dataset_meta)
        return [
            dict(start, bbox=box[None], bbox_score=score[None]) for box, score in zip(boxes, scores)
        ]

    def _detect(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes of people and their scores."""
        with DefaultScope.overwrite_default_scope('mmdet'):
            (sample,) = self.detector(displayable(image), return_datasamples=True)['predictions']
        found = sample.pred_instances.cpu().numpy()
        kept = (found.labels == PERSON) & (found.scores >= self.detector_threshold)
        return found.bboxes[kept], found.scores[kept]

    def _check_boxes(self, boxes: object, media: Sequence) -> Callable[[int], np.ndarray | None]:
        if boxes is None:
            return lambda number: None
        if self.detector is not None:
            raise ValueError('boxes and a detector: give boxes, or build without detector')
        try:
            alike = all(np.ndim(box) <= 1 for box in boxes)
        except (TypeError, ValueError):  # no sequence, or one of different things
            alike = True
        if alike:
            found = check_box_array(boxes, 'boxes')
            return lambda number: found
        if len(boxes) != len(media):
            raise ValueError(
                f'boxes: {len(boxes)} lists for {len(media)} images; give one (N, 4) list for '
                'each image, or a single one for all'
            )
        each = [check_box_array(one, f'boxes[{i}]') for i, one in enumerate(boxes)]
        # A video may have more frames than it says.
        return lambda number: each[min(number, len(each) - 1)]

    def _merge(self, picture: Picture, samples: list) -> Any:
        from mmpose.structures import PoseDataSample, merge_data_samples

        if not samples:
            return PoseDataSample(metainfo=dict(img_path=f'{picture.stem}.jpg'))
        return merge_data_samples(samples)

    def _to_plain(self, sample: Any) -> dict:
        from mmpose.structures import split_instances

        instances = split_instances(sample.get('pred_instances'))
        for instance in instances:
            (instance['bbox'],) = instance['bbox']
            instance['bbox_score'] = float(instance['bbox_score'])
        return dict(instances=instances)

    def _enlarge_sample(self, sample: Any, factor: int) -> Any:
        if 'pred_instances' not in sample:
            return sample
        larger, instances = sample.clone(), sample.pred_instances.clone()  # neither copies arrays
        instances.keypoints = instances.keypoints * factor
        instances.bboxes = instances.bboxes * factor
        larger.pred_instances = instances
        return larger

    def _draw(self, image: np.ndarray, sample: Any, options: dict) -> np.ndarray:
        self.stock.update_model_visualizer_settings(**options)
        bgr = np.ascontiguousarray(image[..., ::-1])
        return self.stock.visualize([bgr], [sample], return_vis=True, **options)[0]


TASKS = dict(cls=ClsInferencer, pose=PoseInferencer, seg=SegInferencer)


def get_inferencer(
    model: str | Path | Config,
    checkpoint: bool | str | Path = True,
    task: str | None = None,
    **kwargs: Any,
) -> Inferencer:
    """Build what looks at images with a model.

    Args:
        model (str | Path | Config): Name of a model of the zoo (:func:`list_models`), path of a
            config, or a config.
        checkpoint (bool | str | Path): The weights: True for the published ones, a file of any
            dialect, ``mmhrformer://NAME`` or a name of the zoo; False leaves random ones.
            Defaults to True.
        task (str, optional): ``'cls'``, ``'pose'`` or ``'seg'``; an error if the model is for
            another. Defaults to None: what the model is for.
        **kwargs: Further arguments of :class:`ClsInferencer`, :class:`PoseInferencer` or
            :class:`SegInferencer`: ``device``, ``dtype``, ``fuse``, ``cfg_options``,
            ``show_progress``, and for pose ``detector``, ``detector_weights`` and
            ``detector_threshold``.

    Returns:
        Inferencer: Call it with images or a video.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        ImportError: If the framework of the task is not installed.
        RuntimeError: If the checkpoint does not fit the model.
        ValueError: If an argument is not possible; the message tells what is.

    Examples:
        >>> segment = get_inferencer('my_config.py', 'my.pth', device='cuda')  # doctest: +SKIP
        >>> segment('folder', batch_size=4, out_dir='found')['files']  # doctest: +SKIP
        ['found/visualizations/a.jpg', 'found/predictions/a.png', 'found/predictions/a.json']
    """
    if task is not None and task not in TASKS:
        hint = did_you_mean(str(task), TASKS)
        raise ValueError(f'task={task!r}: choose one of {list(TASKS)}. {hint}'.rstrip())
    config = open_config(model)
    scope = check_scope(config, TASKS[task].scope if task else None)
    kind = next(kind for kind in TASKS.values() if kind.scope == scope)
    return kind(config, checkpoint, **kwargs)


def inference(
    model: str | Path | Config,
    inputs: object,
    checkpoint: bool | str | Path = True,
    **kwargs: Any,
) -> dict:
    """Find what is in images or a video with a model, in one line.

    Args:
        model (str | Path | Config): As in :func:`get_inferencer`.
        inputs (str | Path | np.ndarray | Sequence): As in :meth:`Inferencer.__call__`.
        checkpoint (bool | str | Path): As in :func:`get_inferencer`. Defaults to True.
        **kwargs: Arguments of :func:`get_inferencer`, and of the call: ``batch_size``, ``boxes``,
            ``out_dir``, ``return_vis``, ``return_datasamples``, ``min_side`` and options of
            drawing.

    Returns:
        dict: As :meth:`Inferencer.__call__`.

    Raises:
        FileNotFoundError: If there is no such config, checkpoint or input.
        ImportError: If the framework of the task is not installed.
        RuntimeError: If the checkpoint does not fit the model.
        TypeError: If the inputs are nothing to look at.
        ValueError: If an argument is not possible; the message tells what is.

    Examples:
        >>> name = 'td-hm_hrformer-small_8xb32-210e_coco-256x192'
        >>> inference(name, 'people.jpg', detector=True, out_dir='found')  # doctest: +SKIP
    """
    media = open_media(inputs)  # before a model is built
    building = {'task', 'device', 'dtype', 'fuse', 'cfg_options', 'show_progress'}
    building |= {'detector', 'detector_weights', 'detector_threshold'}
    options = {key: kwargs.pop(key) for key in building & set(kwargs)}
    return get_inferencer(model, checkpoint, **options)(media, **kwargs)


def check_scope(cfg: Config, wanted: str | None) -> str:
    """Return the ``default_scope`` of a config; refuse one of another task than wanted."""
    scope, model = cfg.get('default_scope'), cfg.filename
    tasks = {kind.scope: task for task, kind in TASKS.items()}
    if scope not in tasks:
        raise ValueError(
            f'model={model!r}: its default_scope is {scope!r}; give a config of one of '
            f'{list(PACKAGES)}'
        )
    if wanted is not None and scope != wanted:
        raise ValueError(
            f'model={model!r} is for task={tasks[scope]!r}, not {tasks[wanted]!r}: give that '
            'task, or another model'
        )
    return scope


def find_weights(cfg: Config, checkpoint: bool | str | Path) -> Path | None:
    """Find the file of the weights; None for random ones."""
    if checkpoint is False:
        return None
    if checkpoint is not True:
        return locate(checkpoint)
    name = name_of(cfg)
    if name not in read_zoo():
        raise ValueError(
            f'checkpoint=True: {cfg.filename!r} is no model of the zoo, nobody published weights '
            'for it; give the path of your checkpoint'
        )
    return locate(name, whole=True)


@contextmanager
def features_in(
    model: nn.Module, device: torch.device, dtype: torch.dtype | None
) -> Iterator[None]:
    """Let backbone and neck compute under autocast, and hand float32 to the heads.

    Heads end in NumPy, which has no bfloat16, and decide about coordinates and classes.

    Args:
        model (nn.Module): The model; it is as before afterwards.
        device (torch.device): Where it is.
        dtype (torch.dtype, optional): What to compute in; None leaves float32.
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


def prepare_config(cfg: Config) -> Config:
    """A copy of a config as the stock inferencers want it; refuse one without a test pipeline."""
    cfg = Config(cfg._cfg_dict.to_dict())
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'pipeline' not in dataset and (dataset.get('dataset') or dataset.get('datasets')):
        dataset = dataset.get('dataset') or dataset['datasets'][0]  # wrapped or concatenated
    if 'pipeline' not in dataset:
        raise ValueError(
            'model: the config has no test_dataloader.dataset.pipeline, which says how images are '
            'prepared; add it'
        )
    cfg.test_dataloader.dataset = dataset
    if cfg.get('visualizer'):
        cfg.visualizer.vis_backends = None  # files are written here
    return cfg


def build_detector(detector: bool | str, weights: str | None, device: torch.device) -> Any:
    """Build mmdet's inferencer; without a name, of the detector that mmpose uses for people."""
    try:
        from mmdet.apis import DetInferencer
    except ImportError as err:
        raise ImportError(
            f'detector={detector!r} needs mmdet: pip install "mmdet>=3.0,<3.4"; or give boxes'
        ) from err
    if detector is True:
        from mmpose.apis.inferencers.utils import default_det_models

        detector = default_det_models['human']['model']
        weights = weights or default_det_models['human']['weights']
    with DefaultScope.overwrite_default_scope('mmdet'):
        return DetInferencer(detector, weights, device=str(device), show_progress=False)

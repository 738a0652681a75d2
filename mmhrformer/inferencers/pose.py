"""Inference for top-down pose estimation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import chain, repeat
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

from ..configs import name_of_type
from ..engine.data_check import other_codecs
from .base import Inferencer
from .image_loading import displayable
from .media import Media, Picture

PERSON = 0  # the category of people in detectors trained on COCO


class PoseInferencer(Inferencer):
    """Pose estimation with mmpose.

    A prediction has ``instances``, one per person: ``keypoints``, ``keypoint_scores``, ``bbox`` and
    ``bbox_score``. People are located by the argument ``boxes`` of a call: (N, 4) of left, top,
    right and bottom in pixels, for all images, or a list of such, one per image; without it, by the
    detector; without either, one person is assumed to fill the image.

    Args:
        *args: As for :class:`Inferencer`.
        detector (bool | str): The person detector: True for mmpose's default, or the name or
            config of another mmdet model. Defaults to False: none.
        detector_weights (str, optional): Checkpoint of the detector. Defaults to None: the
            published one.
        detector_threshold (float): Minimum score of a person. Defaults to 0.3.
        **kwargs: As for :class:`Inferencer`.

    Raises:
        ImportError: If a detector is requested and mmdet is not installed.
        OSError: If the weights of the detector cannot be downloaded.

    Examples:
        >>> name = 'td-hm_hrformer-small_8xb32-210e_coco-256x192'
        >>> find_joints = PoseInferencer(name)  # doctest: +SKIP
        >>> result = find_joints('people.jpg', boxes=[[10, 20, 110, 320]])  # doctest: +SKIP
        >>> len(result['predictions'][0]['instances'][0]['keypoints'])  # doctest: +SKIP
        17
    """

    scope = 'mmpose'
    visualizer_type = 'mmhrformer.PoseVisualizer'
    draw_options = (
        'radius', 'thickness', 'kpt_thr', 'draw_bbox', 'black_background', 'skeleton_style',
    )  # fmt: skip

    def __init__(
        self,
        *args: Any,
        detector: bool | str = False,
        detector_weights: str | None = None,
        detector_threshold: float = 0.3,
        **kwargs: Any,
    ) -> None:
        given = dict(detector_weights=detector_weights, detector_threshold=detector_threshold)
        for name, default in dict(detector_weights=None, detector_threshold=0.3).items():
            if given[name] != default and not detector:
                raise ValueError(f'{name}={given[name]!r} without a detector: set detector as well')
        super().__init__(*args, **kwargs)
        self.detector_threshold = detector_threshold
        self.detector = None
        if detector:
            self.detector = build_detector(detector, detector_weights, self.device)

    def _dataset_meta(self, saved: dict) -> dict:
        from mmpose.apis.inference import dataset_meta_from_config

        if name_of_type(self.cfg.model) != 'TopdownPoseEstimator':
            raise ValueError(
                f'model.type={self.cfg.model.type!r}: PoseInferencer supports only top-down '
                "models, 'TopdownPoseEstimator'"
            )
        used = dict(dataset=dict(pipeline=self.cfg.test_dataloader.dataset.pipeline))
        if faults := other_codecs(dict(model=self.cfg.model, test_dataloader=used)):
            raise ValueError('the images do not fit the decoder: ' + '; '.join(faults))
        meta = dataset_meta_from_config(self.cfg, 'test')
        if meta is None:
            raise ValueError(
                'the config does not define keypoints: set metainfo of test_dataloader.dataset, '
                "as in metainfo=dict(from_file='configs/_base_/datasets/coco.py')"
            )
        check_keypoints(meta, number_of_keypoints(self.cfg.model.head), saved)
        return meta

    def _build_visualizer(self) -> Visualizer:
        options = self.cfg.get('visualizer') or {}
        if name_of_type(options) == 'PoseLocalVisualizer':  # in stock configs
            options.type = self.visualizer_type
        return super()._build_visualizer()

    def _boxes_for(self, media: Media, boxes: object) -> Iterator[np.ndarray | None]:
        if boxes is None:
            return repeat(None)
        if self.detector is not None:
            raise ValueError('boxes and a detector: remove boxes, or build without a detector')
        try:
            is_single = all(np.ndim(box) <= 1 for box in boxes)
        except (TypeError, ValueError):  # not a sequence, or an irregular one
            is_single = True
        if is_single:
            return repeat(check_boxes(boxes, 'boxes'))
        if len(boxes) != len(media):
            raise ValueError(
                f'boxes: {len(boxes)} lists for {len(media)} images; expected one (N, 4) list per '
                'image, or a single one for all'
            )
        each = [check_boxes(one, f'boxes[{i}]') for i, one in enumerate(boxes)]
        return chain(each, repeat(each[-1]))  # a video may have more frames than declared

    def _split(self, loaded: dict, boxes: np.ndarray | None) -> list[dict]:
        """Create one input per person."""
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
        """Find the boxes of people, (N, 4), and their scores, (N,)."""
        with DefaultScope.overwrite_default_scope('mmdet'):
            (sample,) = self.detector(displayable(image), return_datasamples=True)['predictions']
        found = sample.pred_instances.cpu().numpy()
        kept = (found.labels == PERSON) & (found.scores >= self.detector_threshold)
        return found.bboxes[kept], found.scores[kept]

    def _merge(self, picture: Picture, samples: list) -> Any:
        from mmpose.structures import PoseDataSample, merge_data_samples

        if not samples:
            return PoseDataSample(metainfo=dict(img_path=picture.name))
        return merge_data_samples(samples)

    def _to_plain(self, sample: Any) -> dict:
        from mmpose.structures import split_instances

        instances = split_instances(sample.get('pred_instances'))
        for instance in instances:
            (instance['bbox'],) = instance['bbox']
            instance['bbox_score'] = float(instance['bbox_score'])
        return dict(instances=instances)

    def _draw(
        self,
        image: np.ndarray,
        sample: Any,
        radius: int = 3,
        thickness: int = 1,
        black_background: bool = False,
        skeleton_style: str = 'mmpose',
        **options: Any,
    ) -> np.ndarray:
        if skeleton_style not in ('mmpose', 'openpose'):
            raise ValueError(f"skeleton_style={skeleton_style!r}: expected 'mmpose' or 'openpose'")
        self.visualizer.set_dataset_meta(self.dataset_meta, skeleton_style)
        self.visualizer.radius, self.visualizer.line_width = radius, thickness
        return self.visualizer.add_datasample(
            'image',
            image * 0 if black_background else image,
            sample,
            draw_gt=False,
            skeleton_style=skeleton_style,
            **options,
        )


def build_detector(detector: bool | str, weights: str | None, device: torch.device) -> Any:
    """Build mmdet's inferencer; True selects mmpose's default person detector."""
    try:
        from mmdet.apis import DetInferencer
    except ImportError as err:
        raise ImportError(
            f'detector={detector!r} needs mmdet: pip install "mmdet>=3.0,<3.4"; or pass boxes'
        ) from err
    if detector is True:
        from mmpose.apis.inferencers.utils import default_det_models

        detector = default_det_models['human']['model']
        weights = weights or default_det_models['human']['weights']
    try:
        with DefaultScope.overwrite_default_scope('mmdet'):
            return DetInferencer(detector, weights, device=str(device), show_progress=False)
    except URLError as err:
        raise OSError(
            f'detector={detector!r}: cannot download its weights ({err.reason}). Download '
            f'{weights or "them"} in a browser and pass the file as detector_weights; or pass boxes'
        ) from err


def number_of_keypoints(head: Mapping) -> int | None:
    """Number of keypoints of a head, from its config; None if unknown."""
    number, decoder = head.get('out_channels'), head.get('decoder')
    if number and isinstance(decoder, Mapping) and decoder.get('heatmap_type') == 'combined':
        return number // 3  # a map and two offsets per keypoint
    return number


def check_keypoints(meta: Mapping, number: int | None, saved: Mapping) -> None:
    """Refuse metainfo of another number of keypoints; warn if the checkpoint has other ones."""
    if number not in (None, meta['num_keypoints']):
        raise ValueError(
            f'model.head.out_channels={number}, but the metainfo of test_dataloader.dataset has '
            f'{meta["num_keypoints"]} keypoints: set it to that of the training data'
        )
    for key in ('keypoint_id2name', 'flip_indices'):
        if key in saved and saved[key] != meta[key]:
            print_log(
                f'The {key} of the config, {meta[key]}, is used, but the checkpoint has '
                f'{saved[key]}. Correct the metainfo of test_dataloader.dataset if that is wrong.',
                'current',
                logging.WARNING,
            )


def check_boxes(boxes: object, name: str) -> np.ndarray:
    """Return boxes as (N, 4) float32; refuse invalid ones."""
    expected = 'expected (N, 4) numbers: left, top, right, bottom in pixels for each person'
    try:
        array = np.asarray(boxes, np.float32)
    except (TypeError, ValueError) as err:
        raise ValueError(f'{name}={boxes!r}: {expected}') from err
    if array.size == 0:
        return array.reshape(0, 4)  # an image without people
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f'{name}: an array of shape {array.shape}; {expected}')
    flat = ~((array[:, 2] > array[:, 0]) & (array[:, 3] > array[:, 1]) & np.isfinite(array).all(1))
    if flat.any():
        i = int(flat.argmax())
        raise ValueError(
            f'{name}[{i}]={array[i].tolist()}: a box without area; {expected}, not width and height'
        )
    return array

"""Inference for semantic segmentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..datasets.meta import find_classes
from ..engine.config_check import sliding_window_fault
from .base import Inferencer


class SegInferencer(Inferencer):
    """Semantic segmentation with mmsegmentation. The arguments are those of :class:`Inferencer`.

    A prediction has ``size``, height and width; ``areas``, the fraction of the image that each
    class covers, largest first; ``runs``, the run-length encoded labels in row-major order, as
    pairs of label and number of pixels, which :meth:`label_map` decodes to an array.

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
    visualizer_type = 'SegLocalVisualizer'
    draw_options = ('opacity', 'with_labels')

    @staticmethod
    def label_map(prediction: Mapping) -> np.ndarray:
        """Decode the labels of a prediction.

        Args:
            prediction (Mapping): One of the ``predictions``, or the content of its JSON file.

        Returns:
            np.ndarray: The label of each pixel, (H, W) uint8, or uint16 if a label is above 255.

        Examples:
            >>> SegInferencer.label_map(dict(size=[2, 3], runs=[[0, 4], [7, 2]]))
            array([[0, 0, 0],
                   [0, 7, 7]], dtype=uint8)
        """
        labels, lengths = np.array(prediction['runs']).T
        return np.repeat(narrow(labels), lengths).reshape(prediction['size'])

    def _dataset_meta(self, saved: dict) -> dict:
        if fault := sliding_window_fault(self.cfg):
            raise ValueError(fault)
        head = self.cfg.model.decode_head
        num_classes = (head[-1] if isinstance(head, (list, tuple)) else head).num_classes
        classes, palette = find_classes(self.cfg, num_classes, saved)
        classes = classes or tuple(f'class {i}' for i in range(num_classes))
        if palette is None:  # the same random colors as in mmseg's datasets
            palette = np.random.RandomState(42).randint(0, 255, (num_classes, 3)).tolist()
        if num_classes == 1:  # one channel predicts label 1; everything else is label 0
            classes, palette = ('background', *classes), [[0, 0, 0], *palette]
        return dict(classes=classes, palette=palette)

    def _size(self, item: dict) -> tuple:
        # The logits of a batch are resized to one original size.
        return (*super()._size(item), *item['data_samples'].ori_shape)

    def _labels(self, sample: Any) -> np.ndarray:
        return narrow(sample.pred_sem_seg.data[0].numpy())

    def _to_plain(self, sample: Any) -> dict:
        labels = self._labels(sample)
        flat, classes = labels.ravel(), self.dataset_meta['classes']
        starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
        lengths = np.diff(starts, append=flat.size)
        counts = np.bincount(flat, minlength=len(classes))
        areas = Counter()
        for i in np.flatnonzero(counts):  # several classes may have the same name
            areas[classes[i]] += float(counts[i] / flat.size)
        return dict(
            size=list(labels.shape),
            areas=dict(areas.most_common()),
            runs=np.stack([flat[starts], lengths], 1).tolist(),
        )

    def _draw(
        self, image: np.ndarray, sample: Any, opacity: float = 0.8, **options: Any
    ) -> np.ndarray:
        self.visualizer.set_dataset_meta(**self.dataset_meta)
        self.visualizer.alpha = opacity
        self.visualizer.add_datasample('image', image, sample, draw_gt=False, **options)
        return self.visualizer.get_image()


def narrow(labels: np.ndarray) -> np.ndarray:
    """Convert labels to uint8, or to uint16 if one is above 255; PNG files support both."""
    return labels.astype(np.uint8 if labels.max() < 256 else np.uint16)

"""Inference for image classification."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.dataset import default_collate

from ..datasets.meta import find_classes
from .base import Inferencer


class ClsInferencer(Inferencer):
    """Image classification with mmpretrain. The arguments are those of :class:`Inferencer`.

    A prediction has ``pred_label``, ``pred_score``, ``pred_scores`` of all classes and, if the
    config or the checkpoint has class names, ``pred_class``.

    Examples:
        >>> classify = ClsInferencer('hrformer-tiny_8xb128_in1k')  # doctest: +SKIP
        >>> classify('dog.jpg')['predictions'][0]['pred_class']  # doctest: +SKIP
        'golden retriever'
    """

    scope = 'mmpretrain'
    visualizer_type = 'UniversalVisualizer'
    draw_options = ('draw_score', 'resize', 'rescale_factor')
    collate = staticmethod(default_collate)

    def _dataset_meta(self, saved: dict) -> dict:
        head = self.cfg.model.get('head') or {}
        if 'num_classes' not in head:
            raise ValueError(
                f'model.head.type={head.get("type")!r}: ClsInferencer supports only heads with '
                'num_classes'
            )
        return dict(classes=find_classes(self.cfg, head.num_classes, saved)[0])

    def _to_plain(self, sample: Any) -> dict:
        scores, classes = sample.pred_score, self.dataset_meta['classes']
        label = int(scores.argmax())
        plain = dict(pred_scores=scores.tolist(), pred_label=label, pred_score=float(scores.max()))
        return dict(plain, pred_class=classes[label]) if classes else plain

    def _draw(self, image: np.ndarray, sample: Any, **options: Any) -> np.ndarray:
        classes = self.dataset_meta['classes']
        return self.visualizer.visualize_cls(image, sample, classes, draw_gt=False, **options)

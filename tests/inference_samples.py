"""Shared helpers of the inferencer tests: models, images, and checks of predictions."""

from __future__ import annotations

import json

import cv2
import golden
import numpy as np
import pytest
from torch import nn

import mmhrformer

CONFIGS = dict(
    cls='hrformer-demo_1xb64-6e_digits',
    pose='td-hm_hrformer-demo_1xb16-2e_figures-96x128',
    seg='ocrnet_hrformer-demo_1xb16-100_scenes-96x96',
)
FOUND = dict(cls='pred_label', pose='instances', seg='areas')
TASKS = list(CONFIGS)
rng = np.random.default_rng(0)


def make_image(height: int = 48, width: int = 40) -> np.ndarray:
    coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def make_model(task: str) -> nn.Module:
    """A demo model whose normalizations have learned something."""
    model = mmhrformer.get_model(CONFIGS[task])
    golden.recipe.fill_module(model)
    return model


def check(task: str, prediction: dict) -> None:
    """A prediction is complete, and plain Python."""
    assert FOUND[task] in prediction
    assert json.loads(json.dumps(prediction)) == prediction
    if task == 'cls':
        assert len(prediction['pred_scores']) == 10
        assert sum(prediction['pred_scores']) == pytest.approx(1, abs=1e-4)
    elif task == 'pose':
        for one in prediction['instances']:
            assert np.shape(one['keypoints']) == (17, 2)
            assert np.shape(one['bbox']) == (4,)
    else:
        assert sum(prediction['areas'].values()) == pytest.approx(1)
        labels = mmhrformer.SegInferencer.label_map(prediction)
        assert list(labels.shape) == prediction['size']


def assert_close(a: object, b: object) -> None:
    """Plain results are equal up to rounding, which depends on the batch."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_close(one, other)
    else:
        assert a == (b if isinstance(b, str) else pytest.approx(b, abs=1e-3))


def values_of(result: dict) -> np.ndarray:
    """Numbers that tell results of a model apart."""
    (sample,) = result['data_samples']
    if 'pred_score' in sample:
        return sample.pred_score.numpy()
    if 'pred_instances' in sample:
        return sample.pred_instances.keypoint_scores
    return sample.seg_logits.data.numpy()

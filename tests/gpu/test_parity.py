"""The official code's numbers, on a GPU: the tests of the CPU, with this folder's device."""

from __future__ import annotations

import pytest
from needs import may_need
from test_parity import (
    test_classification_outputs,
    test_classification_training,
    test_pose_outputs,
    test_pose_training,
    test_segmentation_outputs,
    test_segmentation_training,
)

__all__ = [
    'test_classification_outputs',
    'test_classification_training',
    'test_pose_outputs',
    'test_pose_training',
    'test_segmentation_outputs',
    'test_segmentation_training',
]
pytestmark = [pytest.mark.gpu, may_need('mmpretrain', 'mmpose', 'mmseg')]


@pytest.fixture
def tolerance() -> float:
    """Tolerance of outputs in float32; gradients are compared in float64, as on a CPU."""
    return 1e-3

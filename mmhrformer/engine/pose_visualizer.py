"""Drawing of poses with current NumPy; imported on demand, since it needs mmpose."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmpose.visualization import PoseLocalVisualizer

from ..registry import VISUALIZERS


@VISUALIZERS.register_module()
class PoseVisualizer(PoseLocalVisualizer):
    """mmpose's visualizer, fixed for drawing keypoints with NumPy 2.4 and later.

    mmpose 1.3 passes radii as arrays of one number, which this NumPy does not convert to int.
    """

    def draw_circles(self, center: np.ndarray, radius: np.ndarray, *args: Any, **kwargs: Any):
        """Draw a circle; the arguments are those of mmpose's visualizer."""
        if self.backend == 'opencv':
            radius = np.asarray(radius).item()
        return super().draw_circles(center, radius, *args, **kwargs)

"""`make demo` learns what it promises."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import pytest
from places import ROOT

pytestmark = pytest.mark.e2e

AT_LEAST = {'top-1 accuracy': 97.0, 'AP': 95.0, 'mIoU': 70.0}


@pytest.mark.slow
def test_demo_learns_all_three_tasks(clone, tmp_path):
    out = clone.run(str(ROOT / 'demo/run_demo.py'), '--out', str(tmp_path))
    print(out)
    for metric, least in AT_LEAST.items():
        value = float(re.search(rf'  {metric} +([\d.]+)%', out).group(1))
        assert value >= least, metric
    pictures = [Path(line.strip()) for line in out.splitlines() if line.endswith('.png')]
    assert len(pictures) == 6
    for picture in pictures:
        assert cv2.imread(str(picture)).std() > 10  # not empty

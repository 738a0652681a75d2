"""Models and inputs for the tests of inferencers."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
import torch
from inference_samples import CONFIGS, make_image
from needs import Made

from mmhrformer import get_inferencer


@pytest.fixture(scope='session')
def models() -> dict:
    def make(task: str):
        pytest.importorskip(dict(cls='mmpretrain', pose='mmpose', seg='mmseg')[task])
        torch.manual_seed(0)
        return get_inferencer(CONFIGS[task], False, task, device='cpu', show_progress=False)

    return Made(make)


@pytest.fixture(scope='session')
def folder(tmp_path_factory) -> Path:
    """Images of different sizes and formats, one of them broken, and other files."""
    path = tmp_path_factory.mktemp('images')
    cv2.imwrite(str(path / 'a.png'), make_image(48, 40))
    cv2.imwrite(str(path / 'a.jpg'), make_image(40, 64))
    cv2.imwrite(str(path / 'c.png'), make_image(48, 40))
    (path / 'b.png').write_bytes((path / 'a.png').read_bytes()[:-200])
    (path / 'notes.txt').write_text('no image')
    (path / 'inside').mkdir()
    return path


@pytest.fixture(scope='session')
def video(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('video') / 'walk.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, (64, 48))
    for _ in range(5):
        writer.write(make_image(48, 64))
    writer.release()
    return path

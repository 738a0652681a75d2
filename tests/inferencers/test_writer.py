"""Files with pictures and predictions."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from inference_samples import make_image

from mmhrformer.inferencers.media import open_media
from mmhrformer.inferencers.writer import Result, Writer


def test_what_was_done_is_kept_when_the_work_stops(models, video, tmp_path, monkeypatch):
    cls, calls = models['cls'], []

    def fail_at_third(items):
        calls.append(items)
        if len(calls) == 3:
            raise RuntimeError('out of memory')
        return type(cls).forward(cls, items)

    monkeypatch.setattr(cls, 'forward', fail_at_third)
    with pytest.raises(RuntimeError, match=r'walk\.avi, frame 2: out of memory'):
        cls(video, out_dir=tmp_path)
    assert len(json.loads((tmp_path / 'predictions/walk.json').read_text())) == 2
    assert cv2.VideoCapture(str(tmp_path / 'visualizations/walk.mp4')).read()[0]


def test_pictures_too_long_for_jpeg_are_written_as_png(tmp_path):
    strip = make_image(4, 66000)
    (picture,) = media = open_media(strip)
    with Writer(tmp_path, media) as writer:
        writer.add(Result(picture, {}, drawn=strip))
    assert np.array_equal(cv2.imread(writer.files[0])[..., ::-1], strip)  # drawn in RGB
    assert writer.files[0].endswith('000000.png')

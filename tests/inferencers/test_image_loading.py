"""Files, arrays and frames are loaded as the first step of a test pipeline says."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine.registry import TRANSFORMS
from PIL import Image

from mmhrformer.inferencers.image_loading import (
    Loader,
    check_file,
    displayable,
    is_image,
    split_pipeline,
)

rng = np.random.default_rng(0)


def loader(**options) -> Loader:
    return Loader(LoadImageFromFile(**options))


PLAIN, GREY, ANY = loader(), loader(color_type='grayscale'), loader(color_type='unchanged')
FLOAT = loader(to_float32=True)
WIDE = loader(to_float32=True, color_type='unchanged')


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return (rng.random(shape) * (255 if dtype == np.uint8 else 60000)).astype(dtype)


@pytest.mark.parametrize(
    ('how', 'array'),
    [
        (PLAIN, noise(8, 6, 3)),
        (GREY, noise(8, 6)),
        (GREY, noise(8, 6, 1)),
        (FLOAT, noise(8, 6, 3)),
        (FLOAT, noise(8, 6, 3).astype(np.float32)),
        (loader(color_type=cv2.IMREAD_GRAYSCALE), noise(8, 6)),
        (loader(color_type='grayscale_ignore_orientation'), noise(8, 6)),
        (loader(color_type=cv2.IMREAD_COLOR), noise(8, 6, 3)),
        (loader(color_type=cv2.IMREAD_ANYDEPTH), noise(8, 6, dtype=np.uint16)),
        (ANY, noise(8, 6)),
        (ANY, noise(8, 6, 4)),
        (ANY, noise(8, 6, 3, dtype=np.uint16)),
        (WIDE, noise(8, 6, dtype=np.uint16)),
        (WIDE, noise(8, 6, 4, dtype=np.float32)),
    ],
)
def test_an_array_that_is_taken_is_what_its_file_gives(how, array, tmp_path):
    """Also from bytes, as they come from the web."""
    file = tmp_path / ('a.tiff' if array.dtype == np.float32 and how is WIDE else 'a.png')
    assert cv2.imwrite(str(file), array)
    read, taken = how.read(file), how.take(array)
    assert (read.shape, read.dtype) == (taken.shape, taken.dtype)
    assert np.array_equal(read, taken)
    assert np.array_equal(how.read(file.read_bytes()), read)


@pytest.mark.parametrize(
    ('how', 'array', 'message'),
    [
        (PLAIN, noise(8, 6), r'shape \(8, 6\) and type uint8; give \(height, width, 3\) uint8'),
        (PLAIN, noise(8, 6, 4), r'\(8, 6, 4\)'),
        (PLAIN, noise(8, 6, 3, dtype=np.uint16), 'type uint16; give'),
        (PLAIN, noise(8, 6, 3).astype(np.float32), 'type float32; give'),
        (FLOAT, rng.random((8, 6, 3), np.float32), 'type float32.*to_float32=True'),
        (FLOAT, np.full((8, 6, 3), np.nan, np.float32), 'type float32'),
        (GREY, noise(8, 6, 3), r"cv2\.IMREAD_GRAYSCALE.*color_type='grayscale'"),
        (ANY, noise(8, 6).astype(bool), r'type bool; give.*cv2\.IMREAD_UNCHANGED'),
        (ANY, noise(2, 8, 6, 3), r'\(2, 8, 6, 3\)'),
        (ANY, noise(0, 6, 3), r'\(0, 6, 3\)'),
    ],
)
def test_other_arrays_are_refused(how, array, message):
    with pytest.raises(ValueError, match=rf'^inputs: an array of .*{message}'):
        how.take(array)


def test_frames_are_brought_into_the_form_of_files():
    frame = noise(8, 6, 3)
    assert np.array_equal(PLAIN.frame(frame), frame)
    assert np.array_equal(ANY.frame(frame), frame)
    assert np.array_equal(GREY.frame(frame), cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY))
    assert FLOAT.frame(frame).dtype == np.float32


class Halves(LoadImageFromFile):
    """A step of somebody's own."""

    def transform(self, results: dict) -> dict:
        results = super().transform(results)
        return dict(results, img=results['img'] // 2)


def test_a_step_of_ones_own_reads_files_and_refuses_arrays(tmp_path):
    image, file = noise(8, 6, 3), tmp_path / 'a.png'
    cv2.imwrite(str(file), image)
    how = Loader(Halves())
    assert np.array_equal(how.read(file), image // 2)
    with pytest.raises(ValueError, match=r'an array; .* loads files by Halves.*Give the paths'):
        how.take(image)


def test_backends_that_are_not_installed():
    for backend in ('tifffile', 'turbojpeg'):
        try:
            __import__(backend)
        except ImportError:
            with pytest.raises(ValueError, match=f"{backend}'.*not installed: pip install"):
                loader(imdecode_backend=backend)


def test_pipelines_are_split_behind_the_loading_step():
    keys = dict(type='RandomFlip', prob=0.0)
    load = dict(type='LoadImageFromFile', color_type='grayscale')
    how, rest = split_pipeline([load, dict(type='mmcv.LoadAnnotations'), keys])
    assert how.step.color_type == 'grayscale'
    assert [type(step).__name__ for step in rest.transforms] == ['RandomFlip']
    how, rest = split_pipeline([keys])  # of a data set that holds arrays
    assert how.step.color_type == 'color'
    assert len(rest.transforms) == 1


def test_other_loading_steps_are_refused():
    class LoadNiftiImage(BaseTransform):
        def transform(self, results: dict) -> dict:
            return results

    TRANSFORMS.register_module(module=LoadNiftiImage)
    try:
        for pipeline in (
            [dict(type='LoadNiftiImage')],
            [dict(type='RandomFlip', prob=0.0), dict(type='LoadImageFromFile')],
        ):
            with pytest.raises(ValueError, match='its test pipeline loads images by Load'):
                split_pipeline(pipeline)
    finally:
        del TRANSFORMS.module_dict['LoadNiftiImage']


def test_files_that_are_refused(tmp_path, monkeypatch):
    whole = tmp_path / 'whole.png'
    cv2.imwrite(str(whole), noise(40, 50, 3))
    content = whole.read_bytes()
    for name, data in (
        ('empty.png', b''),
        ('text.jpg', b'this is text'),
        ('cut.png', content[: len(content) // 2]),
        ('head.png', content[:20]),
        ('junk.png', content[:60] + b'\xff' * 200 + content[260:]),
    ):
        (tmp_path / name).write_bytes(data)
    (tmp_path / 'folder.jpg').mkdir()
    (tmp_path / 'gone.jpg').symlink_to(tmp_path / 'nowhere.jpg')
    os.mkfifo(tmp_path / 'pipe.jpg')
    check_file(whole)
    check_file(content)
    for name, message in (
        ('empty.png', 'it is empty'),
        ('text.jpg', 'it is no image'),
        ('cut.png', 'it is damaged'),
        ('head.png', 'it is'),
        ('junk.png', 'it is damaged'),
        ('folder.jpg', 'it is a folder'),
        ('gone.jpg', 'there is no such file'),
        ('pipe.jpg', 'there is no such file'),
    ):
        with pytest.raises(ValueError, match=message):
            check_file(tmp_path / name)
    assert is_image(whole)
    assert not is_image(tmp_path / 'text.jpg')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 900)
    with pytest.raises(ValueError, match=r'it is too large \(Image size \(2000 pixels.*MAX_I'):
        check_file(whole)
    assert is_image(whole)


def test_what_a_reader_raises_is_told(tmp_path, monkeypatch):
    """Whatever it is, as a ValueError: of a backend, of memory, of a limit of OpenCV."""
    (tmp_path / 'a.png').write_bytes(b'content')
    for error in (MemoryError(), cv2.error('too many pixels'), OverflowError('size')):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(cv2, 'imdecode', fail)
        with pytest.raises(ValueError, match=str(error) or 'MemoryError'):
            PLAIN.read(tmp_path / 'a.png')
    missing = loader(backend_args=dict(backend='petrel'))
    with pytest.raises(ValueError, match=r'cannot read it .*petrel'):
        missing.read(Path('a.png'))


def test_anything_can_be_drawn_on():
    colours = noise(8, 6, 3)
    assert np.array_equal(displayable(colours), colours)
    assert np.array_equal(displayable(colours.astype(np.float32)), colours)
    assert np.array_equal(displayable(np.dstack([colours, colours[..., :1]])), colours)
    for grey in (colours[..., 0], colours[..., :1], colours[..., :2]):
        assert np.array_equal(displayable(grey), np.dstack([colours[..., 0]] * 3))
    for other in (noise(8, 6, dtype=np.uint16), rng.random((8, 6, 12)) - 0.5, noise(8, 6) > 100):
        drawn = displayable(other)
        assert (drawn.shape, drawn.dtype) == ((8, 6, 3), np.uint8)
        assert (drawn.min(), drawn.max()) == (0, 255)
    assert displayable(np.full((2, 2), np.nan)).tolist() == [[[0] * 3] * 2] * 2

"""Files, arrays and frames are loaded as the first step of a test pipeline says."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from inference_samples import CONFIGS, TASKS, make_image, values_of
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine.dataset import Compose, default_collate
from mmengine.registry import TRANSFORMS, DefaultScope
from PIL import Image

from mmhrformer import get_inferencer
from mmhrformer.analysis.feature_maps import draw_features
from mmhrformer.configs import find_config, read_config
from mmhrformer.inferencers import Inferencer
from mmhrformer.inferencers.image_loading import Loader, displayable, split_pipeline
from mmhrformer.inferencers.media import Picture, check_file, is_image, open_media

rng = np.random.default_rng(0)


def loader(**options) -> Loader:
    return Loader(LoadImageFromFile(**options))


PLAIN, GRAY, ANY = loader(), loader(color_type='grayscale'), loader(color_type='unchanged')
FLOAT = loader(to_float32=True)
WIDE = loader(to_float32=True, color_type='unchanged')


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return (rng.random(shape) * (255 if dtype == np.uint8 else 60000)).astype(dtype)


@pytest.mark.parametrize(
    ('how', 'array'),
    [
        (PLAIN, noise(8, 6, 3)),
        (GRAY, noise(8, 6)),
        (GRAY, noise(8, 6, 1)),
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
    file = tmp_path / ('a.tiff' if array.dtype == np.float32 and how is WIDE else 'a.png')
    assert cv2.imwrite(str(file), array)
    read, taken = how.read(file), how.take(array)
    assert (read.shape, read.dtype) == (taken.shape, taken.dtype)
    assert np.array_equal(read, taken)


@pytest.mark.parametrize(
    ('how', 'array', 'message'),
    [
        (PLAIN, noise(8, 6), r'shape \(8, 6\) and type uint8; expected \(height, width, 3\) uint8'),
        (PLAIN, noise(8, 6, 4), r'\(8, 6, 4\)'),
        (PLAIN, noise(8, 6, 3, dtype=np.uint16), 'type uint16; expected'),
        (PLAIN, noise(8, 6, 3).astype(np.float32), 'type float32; expected'),
        (FLOAT, rng.random((8, 6, 3), np.float32), 'type float32.*to_float32=True'),
        (FLOAT, np.full((8, 6, 3), np.nan, np.float32), 'type float32'),
        (GRAY, noise(8, 6, 3), r"cv2\.IMREAD_GRAYSCALE.*color_type='grayscale'"),
        (ANY, noise(8, 6).astype(bool), r'type bool; expected.*cv2\.IMREAD_UNCHANGED'),
        (ANY, noise(2, 8, 6, 3), r'\(2, 8, 6, 3\)'),
        (ANY, noise(0, 6, 3), r'\(0, 6, 3\)'),
    ],
)
def test_other_arrays_are_refused(how, array, message):
    with pytest.raises(ValueError, match=rf'^an array of .*{message}'):
        how.take(array)


def test_frames_are_brought_into_the_form_of_files():
    frame = noise(8, 6, 3)
    picture = Picture('frame 0', '0', frame, is_frame=True)
    assert np.array_equal(PLAIN.load(picture), frame)
    assert np.array_equal(ANY.load(picture), frame)
    assert np.array_equal(GRAY.load(picture), cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY))
    assert FLOAT.load(picture).dtype == np.float32


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
    with pytest.raises(ValueError, match=r'an array; .* loads files by Halves.*Pass the paths'):
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
    how, rest = split_pipeline([keys])  # of a dataset that holds arrays
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
    for name, message in (
        ('empty.png', 'it is empty'),
        ('text.jpg', 'it is not an image'),
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
    colors = noise(8, 6, 3)
    assert np.array_equal(displayable(colors), colors)
    assert np.array_equal(displayable(colors.astype(np.float32)), colors)
    assert np.array_equal(displayable(np.dstack([colors, colors[..., :1]])), colors)
    for gray in (colors[..., 0], colors[..., :1], colors[..., :2]):
        assert np.array_equal(displayable(gray), np.dstack([colors[..., 0]] * 3))
    for other in (noise(8, 6, dtype=np.uint16), rng.random((8, 6, 12)) - 0.5, noise(8, 6) > 100):
        drawn = displayable(other)
        assert (drawn.shape, drawn.dtype) == ((8, 6, 3), np.uint8)
        assert (drawn.min(), drawn.max()) == (0, 255)
    assert displayable(np.full((2, 2), np.nan)).tolist() == [[[0] * 3] * 2] * 2


def as_loaded(task: str, load: dict, channels: int) -> Inferencer:
    """A model whose test pipeline loads images in another way."""
    pytest.importorskip(dict(cls='mmpretrain', pose='mmpose', seg='mmseg')[task])
    cfg = read_config(find_config(CONFIGS[task]))
    cfg.test_dataloader.dataset.pipeline[0].update(load)
    cfg.model.backbone.in_channels = channels
    preprocess = cfg.model.get('data_preprocessor') or cfg.data_preprocessor
    if channels != 3:  # mmpose knows means of one and three channels only
        for key in ('mean', 'std', 'to_rgb', 'bgr_to_rgb'):
            preprocess.pop(key, None)
    torch.manual_seed(0)
    return get_inferencer(cfg, False, device='cpu', show_progress=False)


def stock_sample(ours: Inferencer, task: str, pipeline: list, path: Path):
    """Predictions of the stock inferencer with the same model.

    That of mmpretrain does not look at how the test pipeline loads: the pipeline itself does.
    """
    cfg = copy.deepcopy(ours.cfg)
    cfg.test_dataloader.dataset.pipeline = copy.deepcopy(pipeline)
    if 'visualizer' in cfg:
        cfg.visualizer.vis_backends = None
    own = dict(_init_model=lambda self, *args: ours.model)
    with DefaultScope.overwrite_default_scope(ours.scope):
        if task == 'seg':
            from mmseg.apis import MMSegInferencer

            stock = type('MMSegInferencer', (MMSegInferencer,), own)
            return stock(cfg, device='cpu', **ours.dataset_meta)(str(path), return_datasamples=True)
        if task == 'pose':
            from mmpose.apis import Pose2DInferencer

            stock = type('Pose2DInferencer', (Pose2DInferencer,), own)
            # It looks for the size of the image by OpenCV in color, which knows no such floats.
            source = cv2.imread(str(path), -1) if path.suffix == '.tiff' else str(path)
            found = stock(cfg, det_model='whole_image')(source, return_datasamples=True)
            return next(found)['predictions'][0]
        item = Compose(pipeline)(dict(img_path=str(path)))
        with torch.no_grad():
            return ours.model.test_step(default_collate([item]))[0]


def write_images(folder: Path) -> None:
    """Images of 48x40 pixels in many forms."""
    colors = make_image()
    deep = colors.astype(np.uint16) * 255 + 77
    cv2.imwrite(str(folder / 'color.png'), colors)
    cv2.imwrite(str(folder / 'color.jpg'), colors)
    cv2.imwrite(str(folder / 'gray.png'), colors[..., 0])
    cv2.imwrite(str(folder / 'alpha.png'), np.dstack([colors, colors[..., 0]]))
    cv2.imwrite(str(folder / 'deep.png'), deep)
    cv2.imwrite(str(folder / 'deepgray.png'), deep[..., 0])
    cv2.imwrite(str(folder / 'float.tiff'), deep.astype(np.float32) / 70000)
    photo = Image.fromarray(colors)
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo.save(folder / 'turned.jpg', exif=exif)
    photo.quantize(16).save(folder / 'palette.png')


WAYS = {  # options of the loading step, channels of the model, images
    'color': (dict(), 3, 'color.png alpha.png deep.png turned.jpg palette.png'),
    'gray': (dict(color_type='grayscale'), 1, 'color.jpg alpha.png turned.jpg'),
    'four channels': (dict(color_type='unchanged'), 4, 'alpha.png'),
    '16 bits': (dict(color_type='unchanged', to_float32=True), 3, 'deep.png color.png'),
    '16 bits, gray': (dict(color_type='unchanged', to_float32=True), 1, 'deepgray.png gray.png'),
    'float32': (dict(to_float32=True), 3, 'color.jpg turned.jpg'),
    'floats': (dict(color_type='unchanged'), 3, 'float.tiff'),
    'Pillow': (dict(imdecode_backend='pillow'), 3, 'color.jpg palette.png turned.jpg alpha.png'),
    'Pillow, palette': (
        dict(imdecode_backend='pillow', color_type='unchanged'), 1, 'palette.png gray.png',
    ),
    'Pillow, gray': (dict(imdecode_backend='pillow', color_type='grayscale'), 1, 'color.jpg'),
    'a place': (dict(backend_args=dict(backend='local')), 3, 'color.png'),
}  # fmt: skip


def in_short(task: str, way: str):
    """All ways of loading in one task; a few in the others, since the loader is the same."""
    is_slow = task != 'cls' and list(WAYS).index(way) > 2
    return pytest.param(task, way, marks=pytest.mark.slow if is_slow else [])


@pytest.mark.parametrize(('task', 'way'), [in_short(task, way) for task in TASKS for way in WAYS])
def test_images_are_loaded_as_the_stock_inferencers_load_them(task, way, tmp_path):
    write_images(tmp_path)
    load, channels, names = WAYS[way]
    ours = as_loaded(task, load, channels)
    pipeline = read_config(find_config(CONFIGS[task])).test_dataloader.dataset.pipeline
    pipeline[0].update(load)
    in_list = ours([tmp_path / name for name in names.split()] * 2, return_datasamples=True)
    for i, name in enumerate(names.split()):
        result = ours(tmp_path / name, return_datasamples=True, return_vis=True)
        sample = stock_sample(ours, task, pipeline, tmp_path / name)
        wanted = values_of(dict(data_samples=[sample]))
        assert np.array_equal(values_of(result), wanted), name
        if task == 'pose':
            found = result['data_samples'][0].pred_instances
            assert np.array_equal(found.keypoints, sample.pred_instances.keypoints)
        array = ours.loader.read(tmp_path / name)  # which is as good as the file
        assert np.array_equal(values_of(ours(array, return_datasamples=True)), wanted), name
        assert np.array_equal(values_of(dict(data_samples=[in_list['data_samples'][i]])), wanted)
        assert result['visualization'][0].shape == (*array.shape[:2], 3)
        assert result['visualization'][0].std() > 5


def test_other_ways_and_arrays_are_refused_with_the_reason(models, tmp_path):
    write_images(tmp_path)
    deep = as_loaded('cls', dict(color_type='unchanged'), 3)
    if not hasattr(torch, 'uint16'):
        with pytest.raises(
            ValueError, match=r'deep\.png: its data type is uint16 .*Set to_float32=True'
        ):
            deep(tmp_path / 'deep.png')
    gray = as_loaded('seg', dict(color_type='grayscale'), 1)
    with pytest.raises(
        ValueError, match=r'^inputs: array 1: an array of shape \(48, 40, 3\).*IMREAD_GRAYSCALE'
    ):
        gray([tmp_path / 'gray.png', make_image()], out_dir=tmp_path / 'out')
    assert not (tmp_path / 'out').exists()  # before the work
    pillow = as_loaded('cls', dict(imdecode_backend='pillow'), 3)
    with pytest.raises(
        ValueError, match=r"float\.tiff: .*imdecode_backend='pillow'.*cannot read it"
    ):
        pillow(tmp_path / 'float.tiff')
    with pytest.warns(UserWarning, match=r'float\.tiff: .*cannot read it'):
        both = pillow([tmp_path / 'float.tiff', tmp_path / 'color.png'])['predictions']
    assert ['error' in one for one in both] == [True, False]


def test_a_person_fills_the_image_as_it_was_loaded(tmp_path):
    """mmpose's own inferencer takes the size of the turned photo in any case."""
    write_images(tmp_path)
    unturned = as_loaded('pose', dict(color_type='color_ignore_orientation'), 3)
    (one,) = unturned(tmp_path / 'turned.jpg')['predictions'][0]['instances']
    assert one['bbox'] == [0, 0, 40, 48]


def test_videos_for_a_model_of_gray_images(video, folder):
    gray = as_loaded('pose', dict(color_type='grayscale'), 1)
    result = gray(video, return_vis=True)
    assert len(result['predictions']) == 5
    assert result['visualization'][0].shape == (48, 64, 3)
    (picture,) = open_media(folder / 'a.png')  # read in color, as the model is not known
    assert draw_features(gray, picture).shape[2] == 3

"""One-line use: what can be given, what comes back, and what is said when something is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import cv2
import golden
import numpy as np
import pytest
import torch
from http_server import Answer, Server
from mmengine.config import Config
from mmengine.dataset import Compose, default_collate
from mmengine.registry import DefaultScope
from needs import Made, needs
from PIL import Image

import mmhrformer
from mmhrformer import get_inferencer, inference
from mmhrformer.analysis.feature_maps import draw_features
from mmhrformer.configs import find_config, read_config
from mmhrformer.datasets.meta import find_classes, make_palette
from mmhrformer.inferencers import media
from mmhrformer.inferencers.arguments import check_box_array

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


@pytest.fixture(scope='module')
def models() -> dict:
    def make(task: str):
        pytest.importorskip(dict(cls='mmpretrain', pose='mmpose', seg='mmseg')[task])
        torch.manual_seed(0)
        return get_inferencer(CONFIGS[task], False, task, device='cpu', show_progress=False)

    return Made(make)


@pytest.fixture(scope='module')
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


@pytest.fixture(scope='module')
def video(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('video') / 'walk.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, (64, 48))
    for _ in range(5):
        writer.write(make_image(48, 64))
    writer.release()
    return path


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


@pytest.mark.parametrize('task', TASKS)
def test_path_and_array_give_the_same(task, models, folder):
    path = folder / 'a.png'
    by_path = models[task](path, return_vis=True, return_datasamples=True)
    by_array = models[task](cv2.imread(str(path)))
    (prediction,) = by_path['predictions']
    check(task, prediction)
    assert prediction.pop('input') == str(path)
    assert by_array['predictions'][0].pop('input') == 'array 0'
    assert by_array['predictions'] == [prediction]
    assert by_array['visualization'] == by_array['data_samples'] == by_array['files'] == []
    (drawn,) = by_path['visualization']
    assert drawn.shape == (48, 40, 3)
    assert drawn.dtype == np.uint8
    assert len(by_path['data_samples']) == 1


@pytest.mark.parametrize('task', TASKS)
def test_folder_of_different_sizes_with_a_broken_image(task, models, folder, tmp_path):
    with pytest.warns(UserWarning, match=r'b\.png: it is damaged'):
        result = models[task](str(folder), batch_size=3, out_dir=tmp_path, return_vis=True)
    names = [Path(one['input']).name for one in result['predictions']]
    assert names == ['a.jpg', 'a.png', 'b.png', 'c.png']
    assert 'damaged' in result['predictions'][2]['error']
    assert [drawn is None for drawn in result['visualization']] == [False, False, True, False]
    for name, prediction, stem in zip(names, result['predictions'], ['a', 'a_1', 'b', 'c']):
        assert json.loads((tmp_path / f'predictions/{stem}.json').read_text()) == prediction
        if 'error' in prediction:
            continue
        check(task, prediction)
        alone = models[task](folder / name)['predictions'][0]
        if task == 'pose':  # where random heatmaps have their maximum, depends on rounding
            for one in (*prediction['instances'], *alone['instances']):
                del one['keypoints']
        assert_close(prediction, alone)
        drawn = cv2.imread(str(tmp_path / f'visualizations/{stem}.jpg'))
        assert drawn.shape[:2] == cv2.imread(str(folder / name)).shape[:2]
        if task == 'seg':
            labels = cv2.imread(str(tmp_path / f'predictions/{stem}.png'), cv2.IMREAD_UNCHANGED)
            assert np.array_equal(labels, models[task].label_map(prediction))
    assert sorted(result['files']) == sorted(str(p) for p in tmp_path.glob('*/*'))


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


@pytest.mark.parametrize('task', TASKS)
def test_list_of_anything(task, models, folder):
    content = (folder / 'c.png').read_bytes()
    with Server({'/c.png': content}) as server:
        inputs = [str(folder / 'a.png'), make_image(), folder / 'a.jpg', server.url('c.png')]
        result = models[task](inputs, batch_size=2)
    assert [one['input'] for one in result['predictions']] == [
        str(inputs[0]), 'array 1', str(inputs[2]), inputs[3],
    ]  # fmt: skip
    for prediction in result['predictions']:
        check(task, prediction)


@pytest.mark.parametrize('task', TASKS)
def test_video(task, models, video, tmp_path):
    result = models[task](str(video), batch_size=2, out_dir=tmp_path)
    assert len(result['predictions']) == 5
    assert result['predictions'][3]['input'] == f'{video}, frame 3'
    for prediction in result['predictions']:
        check(task, prediction)
    assert json.loads((tmp_path / 'predictions/walk.json').read_text()) == result['predictions']
    drawn = cv2.VideoCapture(str(tmp_path / 'visualizations/walk.mp4'))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert drawn.get(cv2.CAP_PROP_FPS) == 10
    assert drawn.read()[1].shape == (48, 64, 3)
    assert len(list(tmp_path.glob('predictions/walk_*.png'))) == (5 if task == 'seg' else 0)


@pytest.mark.parametrize('task', TASKS)
def test_address_of_an_image_and_of_a_video(task, models, folder, video):
    files = {'/some%20one.png': (folder / 'a.png').read_bytes(), '/v.avi': video.read_bytes()}
    with Server(files) as server:
        url = server.url('some%20one.png')
        (prediction,) = models[task](url)['predictions']
        frames = models[task](server.url('v.avi'))['predictions']
    assert prediction['input'] == url
    check(task, prediction)
    assert [one['input'].rpartition('/')[2] for one in frames[:2]] == [
        'v.avi, frame 0', 'v.avi, frame 1',
    ]  # fmt: skip


def as_loaded(task: str, load: dict, channels: int) -> mmhrformer.Inferencer:
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


def stock_sample(ours: mmhrformer.Inferencer, task: str, pipeline: list, path: Path):
    """What the stock inferencer finds with the same model.

    That of mmpretrain does not look at how the test pipeline loads: the pipeline itself does.
    """
    cfg = copy.deepcopy(ours.cfg)
    cfg.test_dataloader.dataset.pipeline = copy.deepcopy(pipeline)
    own = dict(_init_model=lambda self, *args: ours.model)
    with DefaultScope.overwrite_default_scope(ours.scope):
        if task == 'seg':
            from mmseg.apis import MMSegInferencer

            stock = type('MMSegInferencer', (MMSegInferencer,), own)
            return stock(cfg, device='cpu', **ours.dataset_meta)(str(path), return_datasamples=True)
        if task == 'pose':
            from mmpose.apis import Pose2DInferencer

            stock = type('Pose2DInferencer', (Pose2DInferencer,), own)
            # It looks for the size of the image by OpenCV in colour, which knows no such floats.
            source = cv2.imread(str(path), -1) if path.suffix == '.tiff' else str(path)
            found = stock(cfg, det_model='whole_image')(source, return_datasamples=True)
            return next(found)['predictions'][0]
        item = Compose(pipeline)(dict(img_path=str(path)))
        with torch.no_grad():
            return ours.model.test_step(default_collate([item]))[0]


def write_images(folder: Path) -> None:
    """Images of 48x40 pixels in many forms."""
    colours = make_image()
    deep = colours.astype(np.uint16) * 255 + 77
    cv2.imwrite(str(folder / 'colour.png'), colours)
    cv2.imwrite(str(folder / 'colour.jpg'), colours)
    cv2.imwrite(str(folder / 'grey.png'), colours[..., 0])
    cv2.imwrite(str(folder / 'alpha.png'), np.dstack([colours, colours[..., 0]]))
    cv2.imwrite(str(folder / 'deep.png'), deep)
    cv2.imwrite(str(folder / 'deepgrey.png'), deep[..., 0])
    cv2.imwrite(str(folder / 'float.tiff'), deep.astype(np.float32) / 70000)
    photo = Image.fromarray(colours)
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo.save(folder / 'turned.jpg', exif=exif)
    photo.quantize(16).save(folder / 'palette.png')


WAYS = {  # options of the loading step, channels of the model, images
    'colour': (dict(), 3, 'colour.png alpha.png deep.png turned.jpg palette.png'),
    'grey': (dict(color_type='grayscale'), 1, 'colour.jpg alpha.png turned.jpg'),
    'four channels': (dict(color_type='unchanged'), 4, 'alpha.png'),
    '16 bits': (dict(color_type='unchanged', to_float32=True), 3, 'deep.png colour.png'),
    '16 bits, grey': (dict(color_type='unchanged', to_float32=True), 1, 'deepgrey.png grey.png'),
    'float32': (dict(to_float32=True), 3, 'colour.jpg turned.jpg'),
    'floats': (dict(color_type='unchanged'), 3, 'float.tiff'),
    'Pillow': (dict(imdecode_backend='pillow'), 3, 'colour.jpg palette.png turned.jpg alpha.png'),
    'Pillow, palette': (
        dict(imdecode_backend='pillow', color_type='unchanged'), 1, 'palette.png grey.png',
    ),
    'Pillow, grey': (dict(imdecode_backend='pillow', color_type='grayscale'), 1, 'colour.jpg'),
    'a place': (dict(backend_args=dict(backend='local')), 3, 'colour.png'),
}  # fmt: skip


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('task', TASKS)
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
        with pytest.raises(ValueError, match=r'deep\.png: it is of uint16 .*Set to_float32=True'):
            deep(tmp_path / 'deep.png')
    grey = as_loaded('seg', dict(color_type='grayscale'), 1)
    with pytest.raises(ValueError, match=r'shape \(48, 40, 3\).*IMREAD_GRAYSCALE'):
        grey([tmp_path / 'grey.png', make_image()], out_dir=tmp_path / 'out')
    assert not (tmp_path / 'out').exists()  # before the work
    pillow = as_loaded('cls', dict(imdecode_backend='pillow'), 3)
    with pytest.raises(
        ValueError, match=r"float\.tiff: .*imdecode_backend='pillow'.*cannot read it"
    ):
        pillow(tmp_path / 'float.tiff')
    with pytest.warns(UserWarning, match=r'float\.tiff: .*cannot read it'):
        both = pillow([tmp_path / 'float.tiff', tmp_path / 'colour.png'])['predictions']
    assert ['error' in one for one in both] == [True, False]


def test_a_person_fills_the_image_as_it_was_loaded(tmp_path):
    """mmpose's own inferencer takes the size of the turned photo in any case."""
    write_images(tmp_path)
    unturned = as_loaded('pose', dict(color_type='color_ignore_orientation'), 3)
    (one,) = unturned(tmp_path / 'turned.jpg')['predictions'][0]['instances']
    assert one['bbox'] == [0, 0, 40, 48]


def test_videos_for_a_model_of_grey_images(video, folder):
    grey = as_loaded('pose', dict(color_type='grayscale'), 1)
    result = grey(video, return_vis=True)
    assert len(result['predictions']) == 5
    assert result['visualization'][0].shape == (48, 64, 3)
    (picture,) = media.open_media(folder / 'a.png')  # read in colour, as the model is not known
    assert draw_features(grey, picture).shape[2] == 3


def spoil(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Put files into a folder that cannot be read, each for a reason of its own."""
    (folder / 'empty.png').touch()
    (folder / 'text.jpg').write_text('this is text')
    (folder / 'gone.jpg').symlink_to(folder / 'nowhere.jpg')
    cv2.imwrite(str(folder / 'tiny.png'), make_image(20, 20))
    cv2.imwrite(str(folder / 'huge.png'), make_image(100, 120))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 5000)
    Image.fromarray(make_image()).save(folder / 'still.gif')
    content = (folder / 'still.gif').read_bytes()
    (folder / 'cut.gif').write_bytes(content[: len(content) * 3 // 4])
    (folder / 'inside.jpg').mkdir()
    reasons = {
        'cut.gif': 'it is damaged',
        'empty.png': 'it is empty',
        'gone.jpg': 'there is no such file',
        'huge.png': 'it is too large',
        'text.jpg': 'it is no image',
        'tiny.png': 'HRFormer got images of 20x20 pixels',
    }
    if cv2.haveImageReader(str(folder / 'still.gif')):  # from OpenCV 4.12 on
        (folder / 'still.gif').unlink()
        return reasons
    return {**reasons, 'still.gif': 'cannot read it'}


@pytest.mark.parametrize('task', ['cls', 'seg'])
def test_no_single_file_ends_a_folder_or_a_list(task, models, tmp_path, monkeypatch):
    reasons = spoil(tmp_path, monkeypatch)
    cv2.imwrite(str(tmp_path / 'good.png'), make_image())
    for inputs in (tmp_path, [str(tmp_path / name) for name in [*reasons, 'good.png']]):
        with pytest.warns(UserWarning, match='left out'):
            result = models[task](inputs, batch_size=3, return_vis=True)
        found = {Path(one['input']).name: one for one in result['predictions']}
        assert set(found) == {*reasons, 'good.png'}
        check(task, found['good.png'])
        for name, reason in reasons.items():
            assert reason in found[name]['error'], name
        assert sum(drawn is None for drawn in result['visualization']) == len(reasons)
    folder = media.open_media(tmp_path)
    (tmp_path / 'good.png').rename(tmp_path / 'renamed.png')
    with (
        pytest.warns(UserWarning, match=r'good\.png: there is no such file'),
        pytest.raises(
            ValueError,
            match=r'none of the \d images could be read, from .*cut\.gif.* on: it is damaged',
        ),
    ):
        models[task](folder)
    # Alone, each is an error; but OpenCV reads the frames of a GIF.
    for name in set(reasons) - {'still.gif', 'cut.gif'}:
        with pytest.raises((FileNotFoundError, ValueError), match=f'{reasons[name]}|no such file'):
            models[task](tmp_path / name)
    if 'still.gif' in reasons:
        assert len(models[task](tmp_path / 'still.gif')['predictions']) == 1


def test_whatever_an_image_lets_happen_is_its_own_error(models, monkeypatch, tmp_path):
    cls, images = models['cls'], [make_image() for _ in range(3)]
    for method, error in (
        ('prepare', MemoryError()),
        ('forward', RuntimeError('out of memory')),
        ('_to_plain', KeyError('pred_score')),
        ('_draw', OverflowError('too wide')),
    ):
        calls = []

        def fail_once(*args, method=method, error=error, calls=calls):
            calls.append(args)
            if len(calls) == 2:
                raise error
            return getattr(type(cls), method)(cls, *args)

        with monkeypatch.context() as patch:
            patch.setattr(cls, method, fail_once)
            with pytest.warns(UserWarning, match='array 1: .*left out'):
                result = cls(images, out_dir=tmp_path / method)
        assert ['error' in one for one in result['predictions']] == [False, True, False], method
        assert result['predictions'][1]['error']
        assert len(result['files']) == 5


class TestWhatIsAVideo:
    @pytest.fixture(scope='class')
    def clips(self, tmp_path_factory) -> Path:
        """Five frames in containers that no list of suffixes has, and under other names."""
        folder = tmp_path_factory.mktemp('clips')
        for name, code in (
            ('a.flv', 'FLV1'),
            ('a.3gp', 'mp4v'),
            ('a.ts', 'mp4v'),
            ('a.mp4', 'mp4v'),
        ):
            writer = cv2.VideoWriter(
                str(folder / name), cv2.VideoWriter_fourcc(*code), 10, (64, 48)
            )
            for _ in range(5):
                writer.write(make_image(48, 64))
            writer.release()
        (folder / 'no_suffix').write_bytes((folder / 'a.flv').read_bytes())
        (folder / 'wrong.jpg').write_bytes((folder / 'a.mp4').read_bytes())
        frames = [Image.fromarray(make_image(48, 64)) for _ in range(5)]
        frames[0].save(folder / 'a.gif', save_all=True, append_images=frames[1:], duration=100)
        return folder

    def test_the_reader_is_asked(self, clips):
        for path in sorted(clips.iterdir()):
            if not path.stat().st_size:
                continue  # an OpenCV that cannot write it
            film = media.open_media(path)
            assert isinstance(film, media.Video), path
            assert [picture.pixels.shape for picture in film] == [(48, 64, 3)] * 5, path

    def test_from_the_web(self, clips):
        names = [name for name in ('a.gif', 'a.3gp', 'no_suffix') if (clips / name).stat().st_size]
        with Server({f'/{name}': (clips / name).read_bytes() for name in names}) as server:
            for name in names:
                assert len(list(media.open_media(server.url(name)))) == 5, name

    def test_in_a_folder_they_are_named(self, clips, tmp_path):
        (tmp_path / 'a.flv').write_bytes((clips / 'a.flv').read_bytes())
        cv2.imwrite(str(tmp_path / 'b.jp2'), make_image())  # a suffix that no list has
        (tmp_path / 'notes.txt').write_text('no image' * 99)
        with pytest.warns(UserWarning, match=r'give each video by itself: a\.flv'):
            (picture,) = media.open_media(tmp_path)
        assert picture.pixels.shape == (48, 40, 3)

    def test_what_is_not_read_is_named(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'text.flv').write_text('this is text')
        (tmp_path / 'notes.txt').write_text('this is text\n' * 50)  # FFmpeg would film it
        (tmp_path / 'image.mp4').write_bytes(cv2.imencode('.png', make_image())[1].tobytes())
        for name, message in (
            ('text.flv', r"'text\.flv': no frame of the video can be read"),
            ('notes.txt', r"'notes\.txt': it is no image"),
            ('webcam', "'webcam': cameras are not read. Record a video"),
            ('webcam:1', 'cameras are not read'),
            ('rtsp://127.0.0.1:9/street', r"'rtsp://127\.0\.0\.1:9/street': no frame"),
        ):
            with pytest.raises(ValueError, match=message):
                media.open_media(name)
        (picture,) = media.open_media('image.mp4')
        assert picture.pixels.shape == (48, 40, 3)

    def test_a_video_that_ends_too_early(self, video):
        film = media.Video(video)
        film._length = 50  # as the header of a file that was cut off says
        with pytest.warns(UserWarning, match=r'walk\.avi: only 5 of 50 frames could be read'):
            assert len(list(film)) == 5


@pytest.mark.parametrize('task', TASKS)
def test_the_config_is_parsed_once(task, monkeypatch):
    pytest.importorskip(dict(cls='mmpretrain', pose='mmpose', seg='mmseg')[task])
    read, parse = [], Config.fromfile

    def count(path, *args, **kwargs):
        read.append(Path(path).stem)
        return parse(path, *args, **kwargs)

    monkeypatch.setattr(Config, 'fromfile', count)
    inference(CONFIGS[task], make_image(), False, device='cpu')
    assert read.count(CONFIGS[task]) == 1
    cfg = parse(find_config(CONFIGS[task]))
    before = cfg.pretty_text
    inference(
        cfg, make_image(), False, device='cpu', cfg_options={'model.backbone.with_rpe': False}
    )
    assert read.count(CONFIGS[task]) == 1
    assert cfg.pretty_text == before  # what is given is not changed


def test_address_without_suffix_and_other_answers(folder):
    content = (folder / 'a.png').read_bytes()
    with Server(content, finally_=Answer(headers={'Content-Type': 'image/png'})) as server:
        (picture,) = media.open_media(server.url('image?id=7'))
        assert (picture.stem, picture.pixels.shape) == ('image', (48, 40, 3))
    page = Answer(headers={'Content-Type': 'text/html'})
    with Server(content, finally_=page) as server, pytest.raises(ValueError, match='is a web page'):
        media.open_media(server.url('a.png'))
    with Server({}) as server, pytest.raises(ValueError, match=r'downloaded \(HTTP Error 404'):
        media.open_media(server.url('a.png'))
    with Server(b'GIF89a') as server, pytest.raises(ValueError, match=r'x\.gif.*Give an image'):
        media.open_media(server.url('x.gif'))
    with pytest.raises(ValueError, match='cannot be downloaded'):
        media.open_media('http://127.0.0.1:9/a.png')


def test_boxes_of_people(models):
    pose, image = models['pose'], make_image(96, 120)
    boxes = [[0, 0, 60, 96], [50, 4.5, 118, 90]]
    both = pose(image, boxes=boxes)['predictions'][0]['instances']
    assert [one['bbox'] for one in both] == boxes
    single = pose(image, boxes=np.array(boxes[1:]), batch_size=4)['predictions'][0]['instances']
    assert_close(single[0]['keypoint_scores'], both[1]['keypoint_scores'])
    whole = pose(image)['predictions'][0]['instances']
    assert [one['bbox'] for one in whole] == [[0, 0, 120, 96]]
    # For each image its own, of different number; nobody is nobody.
    result = pose([image, image, image], boxes=[boxes, boxes[:1], []], batch_size=2, return_vis=1)
    assert [len(one['instances']) for one in result['predictions']] == [2, 1, 0]
    assert np.array_equal(result['visualization'][2], image[..., ::-1])
    one_for_all = pose([image, image], boxes=boxes[:1])['predictions']
    assert [len(one['instances']) for one in one_for_all] == [1, 1]


@pytest.mark.parametrize(
    ('boxes', 'message'),
    [
        ([[1, 2, 3]], r'boxes: an array of shape \(1, 3\); give \(N, 4\)'),
        ([10, 10, 20, 20], r'boxes: an array of shape \(4,\)'),
        ([[10, 10, 5, 20]], r'boxes\[0\]=\[10.0, 10.0, 5.0, 20.0\]: a box without area'),
        ([[0, 0, 9, float('nan')]], 'a box without area'),
        (['person'], 'boxes'),
        (7, r'boxes: an array of shape \(\)|boxes=7'),
        ([[[0, 0, 9, 9]], [[0, 0, 9, 9]]], 'boxes: 2 lists for 1 images'),
        ([[[0, 0, 9]]], r'boxes\[0\]: an array of shape \(1, 3\)'),
    ],
)
def test_wrong_boxes(boxes, message, models):
    with pytest.raises(ValueError, match=message):
        models['pose'](make_image(), boxes=boxes)


def test_boxes_are_for_pose_and_instead_of_a_detector(models, monkeypatch):
    with pytest.raises(ValueError, match='SegInferencer looks at whole images; leave boxes out'):
        models['seg'](make_image(), boxes=[[0, 0, 9, 9]])
    monkeypatch.setattr(models['pose'], 'detector', object())
    with pytest.raises(ValueError, match='give boxes, or build without detector'):
        models['pose'](make_image(), boxes=[[0, 0, 9, 9]])


def test_small_pictures_are_enlarged_by_a_whole_factor(models):
    image = make_image(48, 40)
    for task in TASKS:
        result = models[task](image, min_side=100, return_vis=True)
        assert result['visualization'][0].shape == (144, 120, 3)
        check(task, result['predictions'][0])
    # What is drawn is where it was found.
    sample = models['pose'](image, return_datasamples=True)['data_samples'][0]
    larger = models['pose']._enlarge_sample(sample, 3)
    assert np.allclose(larger.pred_instances.keypoints, 3 * sample.pred_instances.keypoints)
    sample = models['seg'](image, return_datasamples=True)['data_samples'][0]
    larger = models['seg']._enlarge_sample(sample, 3)
    assert torch.equal(larger.pred_sem_seg.data[0, ::3, ::3], sample.pred_sem_seg.data[0])


def test_options_of_drawing(models):
    image = make_image(64, 64)
    full = models['seg'](image, return_vis=True, opacity=1.0, with_labels=False)
    none = models['seg'](image, return_vis=True, opacity=0.0, with_labels=False)
    assert np.array_equal(none['visualization'][0], image[..., ::-1])
    assert not np.array_equal(full['visualization'][0], image[..., ::-1])
    with pytest.raises(ValueError, match=r'opacty=1: no such argument.*did you mean opacity'):
        models['seg'](image, opacty=1)


@pytest.mark.parametrize('task', TASKS)
def test_folded_and_in_bfloat16(task, models, tmp_path):
    file = tmp_path / 'weights.pth'
    torch.save(models[task].model.state_dict(), file)
    image = make_image(64, 48)
    options = dict(checkpoint=file, device='cpu', return_datasamples=True)
    wanted = values_of(models[task](image, return_datasamples=True))
    fused = values_of(inference(CONFIGS[task], image, fuse=True, **options))
    assert np.allclose(fused, wanted, atol=1e-3 * np.abs(wanted).max())
    rough = values_of(
        inference(CONFIGS[task], image, dtype='bfloat16', fuse=task == 'cls', **options)
    )
    assert not np.array_equal(rough, wanted)
    assert np.median(np.abs(rough - wanted)) < 0.1 * np.abs(wanted).max()


def values_of(result: dict) -> np.ndarray:
    """Numbers that tell results of a model apart."""
    (sample,) = result['data_samples']
    if 'pred_score' in sample:
        return sample.pred_score.numpy()
    if 'pred_instances' in sample:
        return sample.pred_instances.keypoint_scores
    return sample.seg_logits.data.numpy()


def test_precision_and_device_that_cannot_be():
    for options, message in (
        (dict(dtype='float8'), r"dtype='float8': choose one of"),
        (dict(device='cuda:99'), r"device='cuda:99'.*Give a device that this machine has"),
        (dict(device='nowhere'), r"device='nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            get_inferencer(CONFIGS['cls'], False, **{'device': 'cpu', **options})


def test_autocast_of_float16_is_refused_where_torch_would_ignore_it():
    try:
        with torch.autocast('cpu', torch.float16):
            possible = torch.is_autocast_cpu_enabled()
    except RuntimeError:
        possible = False
    if possible:
        half = get_inferencer(CONFIGS['cls'], False, device='cpu', dtype='float16')
        assert half.autocast == torch.float16
        return
    with pytest.raises(ValueError, match=r"dtype='float16': torch .* cannot on device='cpu'"):
        get_inferencer(CONFIGS['cls'], False, device='cpu', dtype='float16')


def test_inputs_that_cannot_be_seen(tmp_path, models):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    for name in ('broken/a.png', 'broken/b.jpg', 'text.png', 'walk.mp4'):
        (tmp_path / name).write_text('this is text')
    (tmp_path / 'nothing.png').touch()
    cls = models['cls']
    for inputs, kind, message in (
        (tmp_path / 'no.png', FileNotFoundError, r'no such file .*no\.png.*Check the path'),
        ([make_image(), 'a.png', 'b.png'], FileNotFoundError, 'no such file .*: a.png, b.png'),
        (tmp_path / 'empty', FileNotFoundError, 'no image in that folder'),
        (tmp_path / 'text.png', ValueError, r"text\.png': it is no image. Give an image"),
        (tmp_path / 'nothing.png', ValueError, 'it is empty'),
        (tmp_path / 'walk.mp4', ValueError, r"walk\.mp4': no frame of the video can be read"),
        (tmp_path / 'no.mp4', FileNotFoundError, r"no\.mp4': no such file"),
        ([tmp_path / 'walk.mp4'], ValueError, 'give a video by itself'),
        ([], ValueError, 'the list is empty'),
        (7, TypeError, 'got int; give a path'),
        ([None], TypeError, 'got NoneType'),
        (np.zeros((8, 8), np.uint8), ValueError, r'an array of shape \(8, 8\) and type uint8'),
        (np.zeros((8, 8, 3)), ValueError, 'type float64; give'),
        (make_image(20, 20), ValueError, 'array 0: HRFormer got images of 20x20 pixels'),
    ):
        with pytest.raises(kind, match=message):
            cls(inputs)
    with (
        pytest.warns(UserWarning, match='it is no image'),
        pytest.raises(ValueError, match='none of the 2 images could be read'),
    ):
        cls(tmp_path / 'broken')


def test_other_arguments_that_cannot_be(models, tmp_path):
    (tmp_path / 'file').touch()
    for options, message in (
        (dict(batch_size=0), 'batch_size=0: give a whole number of at least 1'),
        (dict(batch_size=1.5), 'batch_size=1.5'),
        (dict(min_side=-1), 'min_side=-1'),
        (dict(out_dir=tmp_path / 'file'), r'out_dir=.*file.*Give a folder to write to'),
    ):
        with pytest.raises(ValueError, match=message):
            models['cls'](make_image(), **options)


def test_models_tasks_and_checkpoints_that_cannot_be(tmp_path):
    file = tmp_path / 'official.pth'
    torch.save(golden.official_checkpoint('pose', 'keys_pose_tiny.json'), file)
    cls = CONFIGS['cls']
    for model, checkpoint, task, kind, message in (
        ('hrformer-tny_8xb128_in1k', True, None, FileNotFoundError, 'did you mean'),
        (cls, False, 'sge', ValueError, "task='sge': choose.*did you mean seg"),
        (cls, False, 'seg', ValueError, "is for task='cls', not 'seg'"),
        (cls, True, None, ValueError, 'checkpoint=True: .* is no model of the zoo'),
        (cls, 'no.pth', None, FileNotFoundError, "no checkpoint 'no.pth'"),
        (cls, file, None, RuntimeError, r'official\.pth.*checkpoint'),
    ):
        with pytest.raises(kind, match=message):
            inference(model, make_image(), checkpoint, task=task, device='cpu')


def test_weights_of_another_code(tmp_path):
    file = tmp_path / 'official.pth'
    torch.save(golden.official_checkpoint('pose', 'keys_pose_tiny.json'), file)
    name = 'td-hm_hrformer-tiny_8xb32-210e_coco-256x192'
    result = inference(name, make_image(80, 60), f'mmhrformer://{file}', device='cpu')
    check('pose', result['predictions'][0])


def test_classes_come_from_the_config_or_the_checkpoint(models, tmp_path):
    assert models['seg'].dataset_meta['classes'][:2] == ('sky', 'mountain')
    assert models['seg'].dataset_meta['palette'][0] == [135, 190, 235]
    assert models['cls'].dataset_meta['classes'] is None
    names = tuple('abcdefghij')
    file = tmp_path / 'digits.pth'
    meta = dict(dataset_meta=dict(classes=names))
    torch.save(dict(state_dict=models['cls'].model.state_dict(), meta=meta), file)
    (one,) = inference(CONFIGS['cls'], make_image(), file, device='cpu')['predictions']
    assert one['pred_class'] == names[one['pred_label']]
    cfg = read_config(find_config('ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024'))
    cfg.test_dataloader.dataset.type = 'mmseg.CityscapesDataset'
    classes, palette = find_classes(cfg, 19, {})
    assert (classes[0], palette[0]) == ('road', [128, 64, 128])
    assert find_classes(cfg, 18, meta['dataset_meta']) == (None, None)  # of neither


def test_other_numbers_of_classes_are_drawn_too(tmp_path):
    options = {f'model.decode_head.{i}.num_classes': 5 for i in (0, 1)}
    result = inference(
        CONFIGS['seg'], make_image(), False, cfg_options=options, device='cpu', return_vis=True
    )
    assert set(result['predictions'][0]['areas']) <= {f'class {i}' for i in range(5)}
    assert len({tuple(colour) for colour in make_palette(150)}) == 150


def test_configs_that_do_not_tell_enough(tmp_path):
    text = find_config(CONFIGS['cls']).read_text().replace('../_base_', f'{base()}/_base_')
    for added, message in (
        ('test_dataloader = dict(_delete_=True)', 'has no test_dataloader.dataset.pipeline'),
        ("default_scope = 'mmdet'", "default_scope is 'mmdet'; give a config of one of"),
    ):
        path = tmp_path / 'mine.py'
        path.write_text(f'{text}\n{added}\n')
        with pytest.raises(ValueError, match=message):
            get_inferencer(path, False, device='cpu')


def base() -> Path:
    return find_config(CONFIGS['cls']).parents[1]


def test_people_found_by_mmdet(tmp_path):
    mmdet = pytest.importorskip('mmdet')
    config = Path(mmdet.__file__).parent / '.mim/configs/yolox/yolox_tiny_8xb8-300e_coco.py'
    pose = mmhrformer.PoseInferencer(
        CONFIGS['pose'], False, 'cpu', detector=str(config), detector_threshold=0.0
    )
    kept = []
    found = pose.detector(make_image(96, 120), return_datasamples=True)['predictions'][0]
    found.pred_instances = found.pred_instances[:0]
    from mmengine.structures import InstanceData

    found.pred_instances = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 50, 90], [40, 0, 90, 90], [5, 5, 20, 20]]),
        scores=torch.tensor([0.9, 0.2, 0.8]),
        labels=torch.tensor([0, 0, 16]),
    )
    pose.detector = lambda image, **options: kept.append(image) or dict(predictions=[found])
    pose.detector_threshold = 0.3
    (one,) = pose(make_image(96, 120))['predictions'][0]['instances']
    assert one['bbox'] == [0, 0, 50, 90]  # the other is unlikely, the third a dog
    assert one['bbox_score'] == pytest.approx(0.9)
    assert kept[0].shape == (96, 120, 3)


@needs('mmpose')
def test_detector_without_mmdet_or_without_name(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, 'mmdet.apis', None)
    with pytest.raises(ImportError, match=r'detector=True needs mmdet: pip install'):
        mmhrformer.PoseInferencer(CONFIGS['pose'], False, 'cpu', detector=True)
    with pytest.raises(ValueError, match=r"detector_weights='a\.pth' without a detector"):
        mmhrformer.PoseInferencer(CONFIGS['pose'], False, 'cpu', detector_weights='a.pth')


def test_progress_is_shown_on_long_inputs_only(models, monkeypatch, capsys):
    cls = models['cls']
    monkeypatch.setattr(cls, 'show_progress', True)
    cls([make_image()] * 2, batch_size=2)
    assert capsys.readouterr().out == ''
    cls([make_image()] * 3, batch_size=2)
    assert 'Inference' in capsys.readouterr().out


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
    images = media.Images([strip])
    with media.Writer(tmp_path, images) as writer:
        writer.add(next(iter(images)), {}, drawn=strip)
    assert cv2.imread(writer.files[0]).shape == strip.shape
    assert writer.files[0].endswith('000000.png')


def test_box_arrays():
    assert check_box_array([], 'boxes').shape == (0, 4)
    assert check_box_array(((0, 1, 2, 3),), 'boxes').tolist() == [[0, 1, 2, 3]]


@needs('mmseg')
@pytest.mark.parametrize('num_classes', [1, 2])
def test_binary_segmentation_with_one_channel(num_classes, tmp_path):
    """As stock heads have it: ``num_classes=1``, or 2 with ``out_channels=1``."""
    cfg = read_config(find_config(CONFIGS['seg']))
    head = cfg.model.decode_head[0]
    head.update(type='FCNHead', norm_cfg=dict(type='BN'), threshold=0.5)
    head.update(num_classes=num_classes, out_channels=1)
    head.pop('loss_decode')
    cfg.model.update(type='EncoderDecoder', decode_head=head)
    cfg.model.pop('num_stages')
    names, colours = ['sky', 'sea'], [[0, 0, 0], [255, 0, 0]]
    metainfo = dict(classes=names[-num_classes:], palette=colours[-num_classes:])
    cfg.test_dataloader.dataset.metainfo = metainfo
    cfg.dump(tmp_path / 'binary.py')
    torch.manual_seed(0)
    segment = mmhrformer.SegInferencer(tmp_path / 'binary.py', False, device='cpu')
    image = make_image(64, 64)
    (item,) = segment.prepare(next(iter(media.open_media(image))))
    probability = segment.forward([item])[0].seg_logits.data[0]
    segment.model.decode_head.threshold = probability.median().item()
    result = segment(image, return_vis=True, min_side=128, out_dir=tmp_path)
    (prediction,), (drawn,) = result['predictions'], result['visualization']
    check('seg', prediction)
    labels = segment.label_map(prediction)
    assert np.array_equal(labels, probability.numpy() > segment.model.decode_head.threshold)
    assert list(prediction['areas']) == ['sea', 'sky' if num_classes == 2 else 'background']
    foreground = labels.repeat(2, 0).repeat(2, 1) == 1
    assert drawn[foreground][:, 0].mean() > drawn[~foreground][:, 0].mean() + 50

"""One-line use: what can be given, what comes back, and what is said when something is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from http_server import Server
from inference_samples import CONFIGS, TASKS, assert_close, check, make_image, values_of
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, VISUALIZERS
from PIL import Image

from mmhrformer import get_inferencer, inference
from mmhrformer.configs import find_config
from mmhrformer.inferencers import media


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
        'text.jpg': 'it is not an image',
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
        with pytest.warns(UserWarning, match='skipped'):
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
            match=r'none of the \d images could be read; the first one: .*cut\.gif: it is damaged',
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
        ('_load', MemoryError()),
        ('forward', RuntimeError('out of memory')),
        ('_to_plain', KeyError('pred_score')),
        ('_draw', OverflowError('too wide')),
    ):
        calls = []

        def fail_once(*args, method=method, error=error, calls=calls, **options):
            calls.append(args)
            if len(calls) == 2:
                raise error
            return getattr(type(cls), method)(cls, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(cls, method, fail_once)
            with pytest.warns(UserWarning, match='array 1: .*skipped'):
                result = cls(images, out_dir=tmp_path / method)
        assert ['error' in one for one in result['predictions']] == [False, True, False], method
        told = dict(_load='MemoryError', _to_plain="KeyError: 'pred_score'").get(method, str(error))
        assert result['predictions'][1]['error'] == told
        assert len(result['files']) == 5


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


@pytest.mark.parametrize('task', TASKS)
def test_types_may_be_classes(task, models):
    """As in the configs of the frameworks that import what they use."""

    def with_classes(option: object) -> object:
        if isinstance(option, (list, tuple)):
            return [with_classes(one) for one in option]
        if not isinstance(option, dict):
            return option
        option = {key: with_classes(value) for key, value in option.items()}
        if isinstance(kind := option.get('type'), str):
            kind = kind if '.' in kind else f'{cfg.default_scope}.{kind}'
            found = (registry.get(kind) for registry in (MODELS, TRANSFORMS, VISUALIZERS))
            option['type'] = next((one for one in found if one), kind)
        return option

    cfg, image = copy.deepcopy(models[task].cfg), make_image()
    cfg.model = with_classes(cfg.model)
    cfg.visualizer = with_classes(dict(type=models[task].visualizer_type))
    cfg.test_dataloader.dataset.pipeline = with_classes(cfg.test_dataloader.dataset.pipeline)
    inferencer = get_inferencer(cfg, False, device='cpu')
    assert isinstance(cfg.model.type, type)
    assert type(inferencer.visualizer) is type(models[task].visualizer)
    check(task, inferencer(image)['predictions'][0])


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
        (tmp_path / 'text.png', ValueError, r"text\.png': it is not an image. Pass an image"),
        (tmp_path / 'nothing.png', ValueError, 'it is empty'),
        (tmp_path / 'walk.mp4', ValueError, r"walk\.mp4': cannot read from the video"),
        (tmp_path / 'no.mp4', FileNotFoundError, r"no\.mp4': no such file"),
        ([tmp_path / 'walk.mp4'], ValueError, 'pass each video separately'),
        ([], ValueError, 'the list is empty'),
        (7, TypeError, 'got int; expected a path'),
        ([None], TypeError, 'got NoneType'),
        (np.zeros((8, 8), np.uint8), ValueError, r'an array of shape \(8, 8\) and type uint8'),
        (np.zeros((8, 8, 3)), ValueError, 'type float64; expected'),
        (make_image(20, 20), ValueError, 'array 0: HRFormer got images of 20x20 pixels'),
    ):
        with pytest.raises(kind, match=message):
            cls(inputs)
    with (
        pytest.warns(UserWarning, match='it is not an image'),
        pytest.raises(ValueError, match='none of the 2 images could be read'),
    ):
        cls(tmp_path / 'broken')


def test_progress_is_shown_on_long_inputs_only(models, monkeypatch, capsys):
    cls = models['cls']
    monkeypatch.setattr(cls, 'show_progress', True)
    cls([make_image()] * 2, batch_size=2)
    assert capsys.readouterr().out == ''
    cls([make_image()] * 3, batch_size=2)
    assert 'Inference' in capsys.readouterr().out

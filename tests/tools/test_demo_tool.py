"""tools/demo.py: what it takes for granted and what it refuses; tests/e2e runs it as users do."""

from __future__ import annotations

import ast
import json
import runpy
import sys

import cv2
import numpy as np
import places
import pytest

from mmhrformer import get_model

TOOL = places.ROOT / 'tools/demo.py'
CLS = 'hrformer-demo_1xb64-6e_digits'


@pytest.fixture
def demo(tmp_path, monkeypatch, capsys):
    """Run the tool in the folder of the test; returns what it printed, or the error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TOOL.parent))

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, 'argv', [TOOL.name, *args])
        try:
            runpy.run_path(str(TOOL), run_name='__main__')
        except SystemExit as exit:
            shown = capsys.readouterr()
            return exit.code if isinstance(exit.code, str) else shown.out + shown.err
        return capsys.readouterr().out

    return run


@pytest.fixture
def image(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), pixels)
    return 'image.png'


def leave_checkpoint(folder, moved: bool = False) -> None:
    """A checkpoint as written by training, with random weights."""
    import torch

    train = folder / 'demo_output/cls/train'
    train.mkdir(parents=True)
    meta = dict(dataset_meta=dict(classes=tuple('0123456789')))
    torch.save(dict(state_dict=get_model(CLS).state_dict(), meta=meta), train / 'epoch_6.pth')
    noted = ('/somewhere/else' if moved else str(train)) + '/epoch_6.pth'
    (train / 'last_checkpoint').write_text(noted)


def test_help_shows_the_examples(demo):
    text = ast.get_docstring(ast.parse(TOOL.read_text()))
    assert text.count('python -m mmhrformer demo ') == 3
    assert demo('--help').count(text) == 1


def test_a_camera_until_it_is_stopped(demo, tmp_path, monkeypatch):
    leave_checkpoint(tmp_path)
    frame = np.full((40, 36, 3), 99, np.uint8)
    opened = []

    class Camera:
        def __init__(self, source):
            opened.append(source)
            self.frames = 3

        def get(self, prop):
            return -1

        def read(self):
            self.frames -= 1
            if self.frames < 0:
                raise KeyboardInterrupt
            return True, frame

    monkeypatch.setattr(cv2, 'VideoCapture', Camera)
    args = ['--webcam', '1', '--task', 'cls', '--device', 'cpu', '--out', 'out']
    assert demo(*args) == 'demo.py: stopped'
    assert opened == [1, 1]
    assert len(json.loads((tmp_path / 'out/predictions/webcam:1.json').read_text())) == 3
    assert (tmp_path / 'out/visualizations/webcam:1.mp4').stat().st_size > 0


def test_one_kind_of_input(demo, image):
    assert 'expected either INPUT or --webcam N' in demo('--task', 'cls')
    assert 'expected either INPUT or --webcam N' in demo(image, '--webcam', '0', '--task', 'cls')


@pytest.mark.parametrize('moved', [False, True])
def test_checkpoint_that_make_demo_left(moved, demo, image, tmp_path):
    pytest.importorskip('mmpretrain')
    leave_checkpoint(tmp_path, moved)
    out = demo(image, '--task', 'cls', '--device', 'cpu', '--show-features', '--out', 'found')
    files = [line.strip() for line in out.partition('written:')[2].splitlines() if line]
    assert files == [
        'found/visualizations/image.jpg',
        'found/predictions/image.json',
        'found/features/image.png',
    ]
    assert all((tmp_path / file).stat().st_size > 0 for file in files)
    assert 'image.png: ' in out


def test_what_is_refused(demo, image):
    for args, message in (
        (['no.png', '--task', 'cls'], r'no such file'),
        ([image], 'set --task, one of cls, pose, seg, or --model'),
        ([image, '--task', 'cls'], ': "make demo"'),
        ([image, '--task', 'pose', '--boxes', '1,2,3'], '--boxes 1,2,3: expected 4 numbers'),
        ([image, '--model', 'hrformer-tny'], 'did you mean'),
        ([image, '--model', CLS, '--task', 'seg', '--checkpoint', image], "for task='cls'"),
        ([image, '--model', CLS, '--checkpoint', 'no.pth'], "no checkpoint 'no.pth'"),
        ([image, '--model', CLS, '--checkpoint', image], 'image.png'),
        ([image, '--task', 'keypoints'], 'invalid choice'),
        (
            [image, '--task', 'cls', '--block', 'stage4'],
            '--query and --block need --show-attention',
        ),
        ([image, '--task', 'cls', '--query', '0,0'], '--query and --block need --show-attention'),
    ):
        assert message in demo(*args), args


def test_weights_without_a_detector(demo, image):
    pytest.importorskip('mmpose')
    args = ('--task', 'pose', '--checkpoint', 'a.pth', '--detector-weights', 'b.pth')
    assert "detector_weights='b.pth' without a detector: set detector" in demo(image, *args)


def test_query_is_checked_before_the_work(demo, image, tmp_path):
    leave_checkpoint(tmp_path)
    for options in (['--query', 'left'], ['--query', '0.5,1.5'], ['--block', 'stage9']):
        out = demo(image, '--task', 'cls', '--device', 'cpu', '--show-attention', *options)
        assert out.startswith('demo.py: ')
        assert not (tmp_path / 'demo_output/pictures').exists(), options


@pytest.mark.parametrize(
    ('scores', 'shown'),
    [([], '0 people, mean keypoint scores: -'), ([0.5], '1 person, mean keypoint scores: 0.50')],
)
def test_people_are_counted(scores, shown, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    instances = [dict(keypoint_scores=[score]) for score in scores]
    assert runpy.run_path(str(TOOL))['summary'](dict(instances=instances)) == shown

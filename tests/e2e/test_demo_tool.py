"""tools/demo.py as users call it, for each task, with a checkpoint where `make demo` leaves it."""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from places import ROOT
from run_demo import TASKS

from mmhrformer import get_model

pytestmark = pytest.mark.e2e
TOOL = str(ROOT / 'tools/demo.py')


@pytest.fixture(scope='module')
def trained(clone):
    """The demo's models where training leaves them; with random weights, which take no time."""
    torch.manual_seed(0)
    for name, task in TASKS.items():
        train = clone.cwd / f'demo_output/{name}/train'
        train.mkdir(parents=True)
        content = dict(state_dict=get_model(task.config).state_dict(), meta={})
        torch.save(content, train / 'last.pth')
        (train / 'last_checkpoint').write_text(str(train / 'last.pth'))
    return clone


def written(trained, out: str) -> list[str]:
    """The files that the tool says it wrote, which are all there and not empty."""
    files = [line.strip() for line in out.partition('written:\n')[2].splitlines()]
    assert all((trained.cwd / file).stat().st_size > 0 for file in files)
    return files


def test_example_of_the_help_runs(trained):
    # tests/tools sees that this is what --help shows.
    text = ast.get_docstring(ast.parse(Path(TOOL).read_text()))
    example = next(line for line in text.splitlines() if 'data/demo/digits' in line)
    words = shlex.split(example)
    command, args = words[:4], words[4:]
    assert command == ['python', '-m', 'mmhrformer', 'demo']
    out = trained.run(TOOL, *args)
    assert out.count('.png: class ') == 1  # these weights come without names
    pictures, predictions = written(trained, out)
    assert cv2.imread(str(trained.cwd / pictures)).shape[:2] == (256, 256)
    assert len(json.loads((trained.cwd / predictions).read_text())['pred_scores']) == 10


def test_segmentation_of_a_folder_in_batches(trained):
    scenes = trained.cwd / 'scenes'
    scenes.mkdir()
    for path in sorted((trained.cwd / 'data/demo/scenes/img_dir/val').glob('*.jpg'))[:3]:
        (scenes / path.name).symlink_to(path)
    args = ['scenes', '--task', 'seg', '--batch-size', '2', '--out', 'seg', '--show-features']
    files = written(trained, trained.run(TOOL, *args))
    assert len(files) == 3 * 3 + 1
    labels = cv2.imread(str(trained.cwd / 'seg/predictions/0000.png'), cv2.IMREAD_UNCHANGED)
    assert labels.max() < 8
    assert cv2.imread(str(trained.cwd / 'seg/features/0000.png')).std() > 10


def test_people_in_a_video(trained):
    video = cv2.VideoWriter(
        str(trained.cwd / 'walk.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 8, (200, 160)
    )
    for path in sorted((trained.cwd / 'data/demo/figures/val').glob('*.jpg'))[:3]:
        video.write(cv2.imread(str(path)))
    video.release()
    boxes = ['--boxes', '22,3,134,154', '90,7,162,129']
    args = ['walk.avi', '--task', 'pose', *boxes, '--show-attention', '--out', 'pose']
    files = written(trained, trained.run(TOOL, *args))
    assert len(files) == 3
    frames = json.loads((trained.cwd / 'pose/predictions/walk.json').read_text())
    assert [len(frame['instances']) for frame in frames] == [2, 2, 2]
    assert np.shape(frames[0]['instances'][1]['keypoints']) == (17, 2)
    drawn = cv2.VideoCapture(str(trained.cwd / 'pose/visualizations/walk.mp4'))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert cv2.imread(str(trained.cwd / 'pose/attention/walk_000000.png')).std() > 10

"""tools/onnx_pose.py: what the inferencer finds, without torch and OpenMMLab."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import golden
import numpy as np
import onnxruntime
import places
import pytest
from inference_samples import CONFIGS
from matplotlib.cbook import get_sample_data
from needs import may_need

from mmhrformer import get_inferencer
from mmhrformer.datasets.meta import flip_indices_of_outputs, names_of_outputs
from mmhrformer.deploy.onnx import export_onnx

TOOL = places.ROOT / 'tools/onnx_pose.py'
BOX = [60, 20, 480, 590]
pytestmark = may_need('mmpose')
# Runs a script where nothing of torch, OpenMMLab and this package can be found.
ALONE = """
import runpy, sys
from importlib.util import find_spec
sys.path.append(sys.argv[1])
assert not any(map(find_spec, ('torch', 'mmengine', 'mmcv', 'mmpose', 'mmhrformer')))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture(scope='module')
def packages(tmp_path_factory) -> Path:
    """A folder with the packages that the script names."""
    folder = tmp_path_factory.mktemp('packages')
    for package in (np, cv2, onnxruntime):
        source = Path(package.__file__).parent
        for path in (source, *source.parent.glob('*.libs')):
            link = folder / path.name
            if not link.exists():
                link.symlink_to(path)
    return folder


@pytest.fixture
def run_alone(packages, tmp_path) -> Callable[..., str]:
    """A function that runs the script by a Python that finds only these packages."""
    command = [sys._base_executable, '-I', '-S', '-c', ALONE, str(packages), str(TOOL)]
    return lambda *args: places.run([*command, *map(str, args)], tmp_path)


@pytest.fixture(scope='module')
def infer():
    # As in the configs for COCO; the demo is decoded without bias.
    options = {
        'model.head.decoder.type': 'MSRAHeatmap',
        'model.test_cfg.shift_heatmap': True,
        'test_dataloader.dataset.pipeline.2.use_udp': False,
    }
    infer = get_inferencer(CONFIGS['pose'], False, device='cpu', cfg_options=options)
    golden.recipe.fill_module(infer.model)
    return infer


@pytest.fixture
def photo(tmp_path) -> Path:
    with get_sample_data('grace_hopper.jpg') as file:
        (tmp_path / 'photo.jpg').write_bytes(file.read())
    return tmp_path / 'photo.jpg'


@pytest.mark.parametrize('flip', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_equals_the_inferencer(flip, infer, photo, run_alone, tmp_path, monkeypatch):
    options = dict(simplify=False, verify=False, with_normalization=flip)
    names, indices = names_of_outputs(infer.cfg), flip_indices_of_outputs(infer.cfg)
    options.update(names=names, flip_indices=indices)
    export_onnx(infer.model, tmp_path / 'pose.onnx', (128, 96), **options)
    box = ['--box', *BOX] if flip else []  # else the whole image
    args = [*box, '--threshold', '-9', *([] if flip else ['--no-flip'])]
    shown = run_alone('pose.onnx', photo.name, *args)
    monkeypatch.setitem(infer.model.test_cfg, 'flip_test', flip)
    (found,) = infer(str(photo), boxes=[BOX] if flip else None)['predictions']
    (person,) = found['instances']
    *rows, last = [line.split() for line in shown.splitlines()]
    assert [row[0] for row in rows] == names
    assert last[:4] == ['joints.jpg:', str(len(names)), 'of', str(len(names))]
    found = np.array([row[1:] for row in rows], float)
    # Two places of a heatmap may be equally high but for rounding.
    near = np.abs(found[:, :2] - person['keypoints']).max(1) < 0.02
    assert near.mean() > 0.9
    np.testing.assert_allclose(found[:, 2], person['keypoint_scores'], atol=2e-3)
    drawn = cv2.imread(str(tmp_path / 'joints.jpg'))
    assert drawn.shape == cv2.imread(str(photo)).shape
    assert (drawn != cv2.imread(str(photo))).any()


@pytest.mark.parametrize('shift', [True, False])
def test_flips_like_the_config(shift, infer, photo, tmp_path, monkeypatch):
    """Keypoints swap by the config, whatever their names are, and heatmaps are shifted as there."""
    monkeypatch.setitem(infer.model.test_cfg, 'shift_heatmap', shift)
    options = dict(size=(128, 96), simplify=False, verify=False)
    options['flip_indices'] = flip_indices_of_outputs(infer.cfg)
    export_onnx(infer.model, tmp_path / 'pose.onnx', names=[f'k{i}' for i in range(17)], **options)
    model = runpy.run_path(str(TOOL))['PoseModel'](str(tmp_path / 'pose.onnx'))
    _, scores = model(cv2.imread(str(photo)), BOX)
    (found,) = infer(str(photo), boxes=[BOX])['predictions']
    np.testing.assert_allclose(scores, found['instances'][0]['keypoint_scores'], atol=2e-3)
    with pytest.raises(ValueError, match=r'box=\[9, 9, 5, 20\]: expected left < right'):
        model(cv2.imread(str(photo)), [9, 9, 5, 20])


def test_files_it_would_decode_otherwise_are_refused(infer, tmp_path, monkeypatch):
    options = dict(size=(128, 96), simplify=False, verify=False)
    monkeypatch.setattr(infer.model.head.decoder, 'unbiased', True)
    export_onnx(infer.model, tmp_path / 'dark.onnx', **options)
    with pytest.raises(ValueError, match=r'needs the decoder MSRAHeatmap \(unbiased\)'):
        runpy.run_path(str(TOOL))['PoseModel'](str(tmp_path / 'dark.onnx'))


@pytest.mark.slow
def test_mistakes_are_explained(infer, photo, run_alone, tmp_path):
    options = dict(size=(128, 96), simplify=False, verify=False)
    export_onnx(infer.model, tmp_path / 'open.onnx', dynamic_size=True, **options)
    (tmp_path / 'bad.onnx').write_text('none')
    udp = get_inferencer(CONFIGS['pose'], False, device='cpu').model
    export_onnx(udp, tmp_path / 'udp.onnx', **options)
    for args, message in (
        (
            ['open.onnx', photo.name],
            'open.onnx has a dynamic input size: export it without --dynamic-size',
        ),
        (['udp.onnx', photo.name], 'udp.onnx needs the decoder UDPHeatmap, only MSRAHeatmap'),
        (['bad.onnx', photo.name], 'onnx_pose.py: '),
        (['open.onnx', 'none.jpg'], 'OpenCV cannot read none.jpg'),
    ):
        with pytest.raises(AssertionError, match=message):
            run_alone(*args)

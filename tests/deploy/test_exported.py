"""Exported files run by the inferencers: equal predictions, and errors that name the remedy."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import cv2
import golden
import numpy as np
import onnx
import pytest
from inference_samples import CONFIGS, TASKS
from matplotlib.cbook import get_sample_data
from mmengine.config import Config
from needs import Made, may_need

from mmhrformer import get_inferencer
from mmhrformer.analysis.feature_maps import draw_features
from mmhrformer.deploy.onnx import export_onnx
from mmhrformer.inferencers.media import open_media

pytestmark = may_need('mmpose', 'mmseg')
BOXES = dict(boxes=[[60, 20, 480, 590], [100, 50, 400, 500], [10, 10, 300, 590]])


@pytest.fixture(scope='module')
def photo() -> np.ndarray:
    """A photograph of a person, 606x512, BGR."""
    with get_sample_data('grace_hopper.jpg') as file:
        return cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR)


@pytest.fixture(scope='module')
def made(exported) -> dict[str, SimpleNamespace]:
    """For each task an inferencer in torch, and the exported file of its model."""

    def make(task: str) -> SimpleNamespace:
        infer = get_inferencer(CONFIGS[task], False, device='cpu', show_progress=False)
        golden.recipe.fill_module(infer.model)
        return SimpleNamespace(infer=infer, file=exported[task])

    return Made(make)


@pytest.mark.parametrize('task', TASKS)
def test_predictions_equal_those_of_torch(task, made, photo):
    """The file for poses takes pixels, the others normalized images."""
    exported = get_inferencer(CONFIGS[task], made[task].file, show_progress=False)
    options = dict(batch_size=2, return_datasamples=True, **(BOXES if task == 'pose' else {}))
    images = [photo, photo[:, ::-1].copy(), cv2.resize(photo, (200, 300))]
    if task == 'cls':  # of one size, to which the pipeline does not bring them
        images = [cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA) for image in images]
    wanted = made[task].infer(images, **options)
    found = exported(images, **options)
    classes = [each.dataset_meta.get('classes') for each in (exported, made[task].infer)]
    assert classes[0] == classes[1]
    parts = (result[key] for key in ('data_samples', 'predictions') for result in (found, wanted))
    for a, b, one, two in zip(*parts, strict=True):
        if task == 'cls':
            np.testing.assert_allclose(one['pred_scores'], two['pred_scores'], atol=1e-5)
            assert one['pred_label'] == two['pred_label']
        elif task == 'pose':
            points = [s.pred_instances.keypoints for s in (a, b)]
            assert np.median(np.abs(points[0] - points[1])) < 1e-2  # pixels
            scores = [s.pred_instances.keypoint_scores for s in (a, b)]
            np.testing.assert_allclose(*scores, atol=1e-4)
        else:
            logits = [s.seg_logits.data.numpy() for s in (a, b)]
            assert np.abs(logits[0] - logits[1]).max() < 1e-4 * np.ptp(logits[1])
            labels = [s.pred_sem_seg.data.numpy() for s in (a, b)]
            assert (labels[0] == labels[1]).mean() > 0.999


def test_sliding_windows(made, photo, monkeypatch):
    exported, in_torch = get_inferencer(CONFIGS['seg'], made['seg'].file), made['seg'].infer
    slide = Config(dict(mode='slide', crop_size=(96, 96), stride=(64, 64)))
    (whole,) = in_torch(photo)['predictions']
    for infer in (exported, in_torch):
        monkeypatch.setattr(infer.model, 'test_cfg', slide)
    (found,), (wanted,) = (infer(photo)['predictions'] for infer in (exported, in_torch))
    assert wanted['areas'] != whole['areas']
    assert found['areas'] == pytest.approx(wanted['areas'], abs=1e-3)


def test_names_come_from_the_file(made, tmp_path):
    graph = onnx.load(made['cls'].file)
    names = [f'"digit {i}"' for i in range(10)]
    (entry,) = (e for e in graph.metadata_props if e.key == 'names')
    entry.value = f'[{", ".join(names)}]'
    onnx.save(graph, tmp_path / 'a.onnx')
    cfg = copy.deepcopy(made['cls'].infer.cfg)
    cfg.test_dataloader.dataset.pop('metainfo', None)
    cfg.test_dataloader.dataset.type = 'CustomDataset'
    exported = get_inferencer(cfg, tmp_path / 'a.onnx')
    assert exported.dataset_meta['classes'][3] == 'digit 3'


def test_files_of_one_shape_say_so(made, photo, tmp_path):
    file = tmp_path / 'a.onnx'
    options = dict(simplify=False, verify=False, dynamic_size=False, batch=1)
    export_onnx(made['seg'].infer.model, file, (64, 64), **options)
    exported = get_inferencer(CONFIGS['seg'], file)
    with pytest.raises(ValueError, match=r'a\.onnx takes images of shape \(1, 3, 64, 64\), not .*'):
        exported(photo)


@pytest.mark.parametrize(
    ('task', 'options', 'message'),
    [
        ('pose', dict(device='cuda'), "device='cuda': an exported file .* remove device"),
        ('pose', dict(dtype='bfloat16'), "dtype='bfloat16': an exported file"),
        ('pose', dict(fuse=True), 'fuse=True: an exported file is already folded'),
        (
            'seg',
            dict(),
            r'pose\.onnx has task=pose, but the config has task=segmentation: use the config',
        ),
        ('pose', {'model.head.out_channels': 5}, 'channels=17, but the config has channels=5'),
        ('pose', {'model.data_preprocessor.bgr_to_rgb': False}, 'has channel_order=RGB, but the'),
        ('pose', {'model.data_preprocessor.std': [1, 1, 1]}, r'has input_std=\[58\..*=\[1, 1, 1\]'),
    ],
    ids=str,
)
def test_what_is_refused(task, options, message, made):
    if any('.' in name for name in options):
        options = dict(cfg_options=options)
    with pytest.raises(ValueError, match=message):
        get_inferencer(CONFIGS[task], made['pose'].file, **options)


def test_bad_files(made, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r'none\.onnx: there is no such file'):
        get_inferencer(CONFIGS['pose'], tmp_path / 'none.onnx')
    file = tmp_path / 'a.onnx'
    file.write_bytes(made['pose'].file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r'(?s)a\.onnx: onnxruntime cannot read it .*export_onnx'):
        get_inferencer(CONFIGS['pose'], file)
    graph = onnx.load(made['pose'].file)
    del graph.metadata_props[:]
    onnx.save(graph, file)
    with pytest.raises(ValueError, match=r'a\.onnx does not say what it is for; write the file'):
        get_inferencer(CONFIGS['pose'], file)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r'pose\.onnx: to run it, pip install onnxruntime'):
        get_inferencer(CONFIGS['pose'], made['pose'].file)


def test_blocks_are_hidden(made, photo):
    exported = get_inferencer(CONFIGS['pose'], made['pose'].file)
    (picture,) = open_media(photo)
    with pytest.raises(ValueError, match='backbone is a ExportedNetwork, without transformer'):
        draw_features(exported, picture)

"""Segmentation: classes, their colors, and heads of one channel."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from inference_samples import CONFIGS, check, make_image
from needs import needs

import mmhrformer
from mmhrformer import get_inferencer
from mmhrformer.configs import find_config, read_config
from mmhrformer.inferencers.media import open_media


@needs('mmseg')
def test_other_numbers_of_classes_are_drawn_too():
    options = {f'model.decode_head.{i}.num_classes': 150 for i in (0, 1)}
    segment = get_inferencer(CONFIGS['seg'], False, cfg_options=options, device='cpu')
    result = segment(make_image(), return_vis=True)
    assert set(result['predictions'][0]['areas']) <= {f'class {i}' for i in range(150)}
    assert len({tuple(color) for color in segment.dataset_meta['palette']}) == 150


@needs('mmseg')
def test_more_classes_than_fit_into_a_byte(tmp_path):
    options = {f'model.decode_head.{i}.num_classes': 300 for i in (0, 1)}
    segment = get_inferencer(CONFIGS['seg'], False, cfg_options=options, device='cpu')
    torch.nn.init.constant_(segment.model.decode_head[1].conv_seg.bias[280:281], 1e4)
    (prediction,) = segment([make_image()], out_dir=tmp_path)['predictions']
    assert prediction['areas'] == {'class 280': 1.0}
    labels = cv2.imread(str(tmp_path / 'predictions/000000.png'), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(segment.label_map(prediction), labels)
    assert np.unique(labels) == [280]


def test_areas_of_classes_with_the_same_name(models, monkeypatch):
    monkeypatch.setitem(models['seg'].dataset_meta, 'classes', ('a', 'b', 'a'))
    labels = SimpleNamespace(data=torch.tensor([[[0, 1], [2, 2]]]))
    prediction = models['seg']._to_plain(SimpleNamespace(pred_sem_seg=labels))
    assert prediction['areas'] == {'a': 0.75, 'b': 0.25}
    assert prediction['runs'] == [[0, 1], [1, 1], [2, 2]]


def test_options_of_drawing(models):
    image = make_image(64, 64)
    full = models['seg'](image, return_vis=True, opacity=1.0, with_labels=False)
    none = models['seg'](image, return_vis=True, opacity=0.0, with_labels=False)
    assert np.array_equal(none['visualization'][0], image[..., ::-1])
    assert not np.array_equal(full['visualization'][0], image[..., ::-1])
    with pytest.raises(ValueError, match=r'opacty=1: no such argument.*did you mean opacity'):
        models['seg'](image, opacty=1)


@needs('mmseg')
def test_a_sliding_window_without_its_steps():
    options = {'model.test_cfg': dict(mode='slide', crop_size=(64, 64))}
    with pytest.raises(ValueError, match=r"test_cfg\.stride=None: mode='slide' needs"):
        get_inferencer(CONFIGS['seg'], False, cfg_options=options, device='cpu')


@needs('mmseg')
@pytest.mark.parametrize('num_classes', [1, 2])
def test_binary_segmentation_with_one_channel(num_classes, tmp_path):
    """As in stock heads: ``num_classes=1``, or 2 with ``out_channels=1``."""
    cfg = read_config(find_config(CONFIGS['seg']))
    head = cfg.model.decode_head[0]
    head.update(type='FCNHead', norm_cfg=dict(type='BN'), threshold=0.5)
    head.update(num_classes=num_classes, out_channels=1)
    head.pop('loss_decode')
    cfg.model.update(type='EncoderDecoder', decode_head=head)
    cfg.model.pop('num_stages')
    names, colors = ['sky', 'sea'], [[0, 0, 0], [255, 0, 0]]
    metainfo = dict(classes=names[-num_classes:], palette=colors[-num_classes:])
    cfg.test_dataloader.dataset.metainfo = metainfo
    cfg.dump(tmp_path / 'binary.py')
    torch.manual_seed(0)
    segment = mmhrformer.SegInferencer(tmp_path / 'binary.py', False, device='cpu')
    image = make_image(64, 64)
    (item,) = segment.prepare(open_media(image)[0])
    probability = segment.forward([item])[0].seg_logits.data[0]
    segment.model.decode_head.threshold = probability.quantile(0.4).item()  # more sea than sky
    result = segment(image, return_vis=True, out_dir=tmp_path)
    (prediction,), (drawn,) = result['predictions'], result['visualization']
    check('seg', prediction)
    labels = segment.label_map(prediction)
    assert np.array_equal(labels, probability.numpy() > segment.model.decode_head.threshold)
    assert list(prediction['areas']) == ['sea', 'sky' if num_classes == 2 else 'background']
    foreground = labels == 1
    assert drawn[foreground][:, 0].mean() > drawn[~foreground][:, 0].mean() + 50

"""The configs of detection, beyond the paper: they build, train a step and find something."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from needs import needs

from mmhrformer.configs import config_root

CONFIGS = sorted(config_root().glob('hrformer_det/*.py'))
CHANNELS = {'tiny': [18, 36, 72, 144], 'small': [32, 64, 128, 256]}

pytestmark = needs('mmdet')


def sample(size: int):
    """An image's labels: two objects with boxes and masks."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[8.0, 8, 40, 56], [30, 20, 90, 80]])
    masks = np.zeros((2, size, size), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    shape = (size, size)
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape)
    instances = InstanceData(
        bboxes=boxes, labels=torch.tensor([3, 17]), masks=BitmapMasks(masks, size, size)
    )
    return DetDataSample(metainfo=dict(meta, scale_factor=(1.0, 1.0)), gt_instances=instances)


def test_there_are_two_detectors_in_two_sizes():
    assert len(CONFIGS) == 4


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, marks=pytest.mark.slow if 'small' in path.stem else [], id=path.stem)
        for path in CONFIGS
    ],
)
def test_training_step_and_prediction(path):
    cfg = Config.fromfile(path)
    arch = cfg.model.backbone.arch
    assert f'hrformer-{arch}_' in path.stem
    assert cfg.model.neck.in_channels == CHANNELS[arch][-len(cfg.model.neck.in_channels) :]
    assert cfg.model.backbone.init_cfg.checkpoint == f'mmhrformer://hrformer-{arch}_8xb128_in1k'
    cfg.model.backbone.init_cfg = None
    cfg.model.backbone.arch = dict(
        channels=CHANNELS[arch], num_heads=(1, 2, 4, 8), num_modules=(1, 1, 1), num_blocks=1
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
        wrapper = build_optim_wrapper(model, dict(cfg.optim_wrapper, type='OptimWrapper'))
        images = torch.rand(2, 3, 96, 96)
        losses, _ = model.parse_losses(model(images, [sample(96), sample(96)], mode='loss'))
        before = model.backbone.stage4[0].branches[-1][0].attn.qkv.weight.clone()
        wrapper.update_params(losses)
        assert torch.isfinite(losses)
        assert not torch.equal(model.backbone.stage4[0].branches[-1][0].attn.qkv.weight, before)
        model.train(False)
        with torch.no_grad():
            (found,) = model(torch.rand(1, 3, 96, 128), [sample(96)], mode='predict')
    scores = found.pred_instances.scores
    assert found.pred_instances.bboxes.shape == (len(scores), 4)
    assert torch.isfinite(scores).all()
    assert ('masks' in found.pred_instances) == path.stem.startswith('mask-rcnn')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_nobody_reports_a_number(path):
    """The files and the page say so, and the zoo has none of them."""
    from mmhrformer import list_models

    assert 'no results are reported' in path.read_text()
    assert path.stem not in list_models()
    page = (path.parent / 'README.md').read_text()
    assert 'Nobody has trained them, and there are no reported' in page
    assert path.name in page

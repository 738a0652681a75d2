"""Every shipped config builds the official model, trains a step and predicts on made-up data."""

from __future__ import annotations

import re
from collections.abc import Callable

import golden
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope
from mmengine.structures import InstanceData, PixelData

from mmhrformer.configs import config_root

PARAMETERS = golden.read_json('params_flops.json')['parameters']
CLASSES = {'cityscapes': 19, 'pascal-context-59': 59, 'coco-stuff10k': 171, 'ade20k': 150}


def official_parameters(name: str) -> int:
    """Parameters of the official model that a config builds."""
    arch, window = re.search(r'hrformer-(tiny|small|base)(?:-w(\d+))?_', name).groups()
    if name.startswith('hrformer-'):
        return PARAMETERS[f'cls {arch}']['total']
    if name.startswith('td-hm'):
        return PARAMETERS[f'pose {arch}']['total']
    (classes,) = (number for data, number in CLASSES.items() if data in name)
    # Two classifiers of 512 channels and a bias, counted with 19 classes.
    total = PARAMETERS[f'seg {arch} w{window or 7} 19cls']['total']
    return total + 2 * (classes - 19) * (512 + 1)


ALL = {path.stem: path for path in sorted(config_root().glob('[!_]*/*.py'))}


def cls_sample(cfg: Config, rng: np.random.Generator) -> dict:
    from mmpretrain.structures import DataSample

    classes = cfg.model.head.num_classes
    image = torch.from_numpy(rng.integers(0, 256, (3, 64, 64), np.uint8))
    return dict(inputs=image, data_samples=DataSample().set_gt_label(int(rng.integers(0, classes))))


def pose_sample(cfg: Config, rng: np.random.Generator) -> dict:
    from mmpose.datasets.datasets.utils import parse_pose_metainfo
    from mmpose.structures import PoseDataSample

    size = np.array([48, 64])  # (width, height): a quarter of the real ones
    joints = cfg.model.head.out_channels
    heatmaps = rng.random((joints, size[1] // 4, size[0] // 4), np.float32)
    sample = PoseDataSample(
        metainfo=dict(
            parse_pose_metainfo(dict(from_file='configs/_base_/datasets/coco.py')),
            input_size=size,
            input_center=size / 2.0,
            input_scale=size.astype(float),
        )
    )
    sample.gt_fields = PixelData(heatmaps=torch.from_numpy(heatmaps))
    sample.gt_instances = InstanceData(
        bboxes=np.array([[0, 0, *size]], float), bbox_scores=np.ones(1, np.float32)
    )
    weights = torch.ones(1, joints)
    sample.gt_instance_labels = InstanceData(keypoint_weights=weights)
    image = torch.from_numpy(rng.integers(0, 256, (3, *size[::-1]), np.uint8))
    return dict(inputs=image, data_samples=sample)


def seg_sample(cfg: Config, rng: np.random.Generator) -> dict:
    from mmseg.structures import SegDataSample

    size = (40, 56)
    classes = cfg.model.decode_head[-1].num_classes
    labels = rng.integers(0, classes, (1, *size))
    labels[:, :4] = 255
    sample = SegDataSample(
        metainfo=dict(img_shape=size, ori_shape=(30, 42), pad_shape=size, img_path='')
    )
    sample.gt_sem_seg = PixelData(data=torch.from_numpy(labels))
    image = torch.from_numpy(rng.integers(0, 256, (3, *size), np.uint8))
    return dict(inputs=image, data_samples=sample)


SAMPLES: dict[str, Callable] = {
    'mmpretrain': cls_sample,
    'mmpose': pose_sample,
    'mmseg': seg_sample,
}


def prepare(name: str):
    """The model of a config for the CPU, its optimizer, and a batch of two samples."""
    cfg = Config.fromfile(ALL[name])
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (40, 56)
        cfg.model.decode_head[-1].loss_decode.update(
            dict(min_kept=100) if 'OHEM' in cfg.model.decode_head[-1].loss_decode.type else {}
        )
    if cfg.default_scope == 'mmpose':
        codec = cfg.model.head.decoder
        codec.update(input_size=(48, 64), heatmap_size=(12, 16))
    if cfg.get('data_preprocessor'):  # mmengine's runner puts it into the model
        cfg.model.data_preprocessor = dict(type='ClsDataPreprocessor', **cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    options = dict(cfg.optim_wrapper, type='OptimWrapper')
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type=options.pop('constructor'),
            paramwise_cfg=options.pop('paramwise_cfg'),
            optim_wrapper_cfg=options,
        )
    )
    rng = np.random.default_rng(0)
    samples = [SAMPLES[cfg.default_scope](cfg, rng) for _ in range(2)]
    keys = samples[0].keys()
    batch = {key: [sample[key] for sample in samples] for key in keys}
    return cfg, model, constructor(model), batch


# Those of the ablations: test_ablations.py.
@pytest.mark.parametrize('name', [n for n, path in ALL.items() if path.parent.name != 'ablations'])
def test_training_step_and_prediction(name):
    torch.manual_seed(0)
    cfg, model, optimizer, batch = prepare(name)
    if not ALL[name].match('demo/*'):
        assert sum(p.numel() for p in model.parameters()) == official_parameters(name)
    before = {key: value.clone() for key, value in model.named_parameters()}
    model.train()
    losses = model.train_step(batch, optimizer)
    assert torch.isfinite(losses['loss'])
    unchanged = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    # Drop path leaves a block of both samples out now and then.
    assert len(unchanged) < 0.05 * len(before), unchanged
    model.train(False)
    (first, _) = model.test_step(batch)
    if cfg.default_scope == 'mmpretrain':
        assert first.pred_score.shape == (cfg.model.head.num_classes,)
        assert first.pred_score.sum().item() == pytest.approx(1, abs=1e-4)
    elif cfg.default_scope == 'mmpose':
        assert first.pred_instances.keypoints.shape == (1, cfg.model.head.out_channels, 2)
        assert np.isfinite(first.pred_instances.keypoints).all()
    else:
        assert first.pred_sem_seg.data.shape == (1, 30, 42)
        assert first.seg_logits.data.shape == (cfg.model.decode_head[-1].num_classes, 30, 42)
        assert torch.isfinite(first.seg_logits.data).all()

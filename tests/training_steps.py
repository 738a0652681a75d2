"""A training step and a prediction of any shipped config, on made-up samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from mmhrformer import ARCHS


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


def shrink(cfg: Config) -> None:
    """Make a backbone shallow, its channels stay, and the heads of segmentation narrow."""
    backbone = cfg.model.backbone
    if 'drop_path_rate' in backbone:
        backbone.drop_path_rate = 0.0  # it would leave out much of what is left
    for head in cfg.model.get('decode_head', []):
        head.channels = 32
    kind = backbone.type.split('.')[-1]
    if kind == 'HRFormer':
        backbone.arch = {**ARCHS[backbone.arch], 'num_modules': (1, 1, 1), 'num_blocks': 1}
    elif kind == 'HRNet':
        for stage in list(backbone.extra.values())[1:]:
            stage.num_modules, stage.num_blocks = 1, (1,) * stage.num_branches
    elif kind == 'SwinTransformer':
        width = dict(tiny=96, base=128)[backbone.arch]
        heads = [width // 32 * 2**i for i in range(4)]
        backbone.arch = dict(embed_dims=width, depths=[2, 2, 2, 2], num_heads=heads)
        backbone.pad_small_map = True  # the images are small, too
    else:
        width = dict(large=1024).get(backbone.arch, 768)
        backbone.arch = dict(
            embed_dims=width, num_layers=2, num_heads=width // 64, feedforward_channels=4 * width
        )


class Prepared(NamedTuple):
    """The model of a config for the CPU, its optimizer, and a batch of two samples."""

    cfg: Config
    model: nn.Module
    optimizer: OptimWrapper
    batch: dict


def prepare(cfg: Config) -> Prepared:
    """Build what a step takes, from a config that may be changed."""
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
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    return Prepared(cfg, model, constructor(model), batch)


def train_and_predict(prepared: Prepared) -> None:
    """A step changes all parameters, and the prediction after it has the right form."""
    cfg, model, optimizer, batch = prepared
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


def count_parameters(cfg: Config) -> int:
    """The number of a model's parameters, for which no memory is taken and nothing is drawn."""
    # Swin Transformers of mmpretrain read numbers off tensors while they are built.
    device = 'cpu' if 'Swin' in cfg.model.backbone.type else 'meta'
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device(device):
        return sum(p.numel() for p in MODELS.build(cfg.model).parameters())

"""The messages of stock packages quoted in the FAQ, and its remedies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

from mmhrformer import HRFormer, HRFormerFusion

FAQ = (Path(__file__).parents[1] / 'docs/faq.md').read_text()
ARCH = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
JOINTS = 17


def quoted(error: pytest.ExceptionInfo) -> bool:
    """Whether the FAQ quotes the beginning of a message."""
    return any(len(text) > 20 and str(error.value).startswith(text) for text in FAQ.split('`'))


def test_batch_of_one_image():
    model = torch.nn.Sequential(HRFormer(ARCH), HRFormerFusion(ARCH['channels'])).train()
    with pytest.raises(ValueError, match='Expected more') as error:
        model(torch.rand(1, 3, 32, 32))
    assert quoted(error)
    for batch, side in ((2, 32), (1, 64)):
        model(torch.rand(batch, 3, side, side))


def pose_loss(input_size: tuple, heatmap_size: tuple, visibility: float = 1) -> float:
    """Loss of a pose model for one person."""
    structures = pytest.importorskip('mmpose.structures')
    from mmengine.structures import InstanceData, PixelData
    from mmpose.registry import KEYPOINT_CODECS, MODELS

    codec = dict(type='UDPHeatmap', input_size=input_size, heatmap_size=heatmap_size, sigma=2)
    loss = dict(type='KeypointMSELoss', use_target_weight=True)
    head = dict(type='HeatmapHead', in_channels=8, out_channels=JOINTS, deconv_out_channels=None)
    head.update(loss=loss, decoder=codec)
    backbone = dict(type='mmhrformer.HRFormer', arch=ARCH, out_indices=0)
    with DefaultScope.overwrite_default_scope('mmpose'):
        model = MODELS.build(dict(type='TopdownPoseEstimator', backbone=backbone, head=head))
    places = np.full((1, JOINTS, 2), 40, np.float32)
    target = KEYPOINT_CODECS.build(codec).encode(places, np.full((1, JOINTS), visibility))
    sample = structures.PoseDataSample()
    sample.gt_fields = PixelData(heatmaps=torch.from_numpy(target['heatmaps']))
    weights = torch.from_numpy(target['keypoint_weights']).float()
    sample.gt_instance_labels = InstanceData(keypoint_weights=weights)
    image = torch.rand(1, 3, *input_size[::-1])
    return model.train().loss(image, [sample])['loss_kpt'].item()


@pytest.mark.filterwarnings('ignore:Using a target size')
def test_heatmap_that_was_rounded_down():
    with pytest.raises(RuntimeError, match='must match') as error:
        pose_loss((346, 260), (86, 65))
    assert quoted(error)
    for input_size, heatmap_size in (((346, 260), (87, 65)), ((352, 256), (88, 64))):
        assert f'input_size={input_size}' in FAQ
        assert f'heatmap_size={heatmap_size}' in FAQ
        assert pose_loss(input_size, heatmap_size) > 0


def test_all_key_points_are_invisible(tmp_path):
    pytest.importorskip('mmpose.datasets')
    from mmpose.registry import DATASETS

    def load(visibility: int, number: int) -> int:
        person = dict(id=1, image_id=1, category_id=1, iscrowd=0, bbox=[20, 20, 90, 90], area=8100)
        person.update(num_keypoints=number, keypoints=[40, 40, visibility] * JOINTS)
        content = dict(images=[dict(id=1, file_name='a.jpg', width=99, height=99)])
        content.update(annotations=[person], categories=[dict(id=1, name='person')])
        file = tmp_path / 'a.json'
        file.write_text(json.dumps(content))
        with DefaultScope.overwrite_default_scope('mmpose'):
            return len(DATASETS.build(dict(type='CocoDataset', ann_file=str(file), pipeline=[])))

    with pytest.raises(ValueError, match='need at least one array') as error:
        load(visibility=0, number=0)
    assert quoted(error)
    assert load(visibility=0, number=JOINTS) == load(visibility=1, number=JOINTS) == 1
    assert pose_loss((96, 128), (24, 32), visibility=0) == 0
    assert pose_loss((96, 128), (24, 32), visibility=1) > 0

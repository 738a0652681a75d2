"""`mmhrformer://FILE` works wherever mmengine takes a checkpoint."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import torch
from mmengine.runner import CheckpointLoader
from mmengine.runner import load_checkpoint as mmengine_load
from needs import may_need

import mmhrformer
from mmhrformer import HRFormer
from mmhrformer.checkpoints import dialects

pytestmark = may_need('mmpose', 'mmseg')

CASES = {
    'cls': ('keys_cls_tiny.json', golden.CLS_CONFIGS['tiny']),
    'pose': ('keys_pose_tiny.json', golden.POSE_CONFIGS['tiny']),
    'seg': ('keys_seg_small_w7.json', golden.SEG_CONFIGS['small']),
}


def same(state: dict, expected: dict) -> bool:
    return state.keys() == expected.keys() and all(
        torch.equal(state[key], expected[key]) for key in expected
    )


@pytest.mark.parametrize('task', CASES)
def test_official_file_into_a_whole_model(task, tmp_path):
    keys, config = CASES[task]
    checkpoint = golden.official_checkpoint(task, keys)
    torch.save(checkpoint, tmp_path / 'official.pth')
    expected, model = golden.build(config), golden.build(config)
    mmhrformer.load_checkpoint(expected, checkpoint, strict=True)
    mmengine_load(model, f'mmhrformer://{tmp_path}/official.pth', strict=True)
    assert same(model.state_dict(), expected.state_dict())


def test_tensors_are_translated_once(monkeypatch, tmp_path):
    """Converted by the scheme; nothing is left to do for the load hook of the backbone."""
    checkpoint = golden.official_checkpoint('pose', 'keys_pose_tiny.json')
    torch.save(checkpoint, tmp_path / 'official.pth')
    renamed, rename = [], dialects.rename
    monkeypatch.setattr(
        dialects, 'rename', lambda name, *rest: renamed.append(name) or rename(name, *rest)
    )
    model = golden.build(golden.POSE_CONFIGS['tiny'])
    mmengine_load(model, f'mmhrformer://{tmp_path}/official.pth', strict=True)
    assert 0 < len(renamed) <= len(golden.official_state_dict('keys_pose_tiny.json'))


def test_imagenet_file_into_a_backbone_by_init_cfg(tmp_path):
    checkpoint = golden.official_checkpoint('cls', 'keys_cls_tiny.json')
    torch.save(checkpoint, tmp_path / 'official.pth')
    expected = HRFormer('tiny', window_size=13)
    mmhrformer.load_checkpoint(expected, checkpoint)
    options = {
        'model.backbone.init_cfg.type': 'Pretrained',
        'model.backbone.init_cfg.checkpoint': f'mmhrformer://{tmp_path}/official.pth',
        'model.backbone.window_size': 13,
        'model.backbone.out_indices': (0, 1, 2, 3),
    }
    model = golden.build(golden.POSE_CONFIGS['tiny'], **options)
    model.init_weights()
    assert same(model.backbone.state_dict(), expected.state_dict())


def test_missing_and_foreign_files_are_errors(tmp_path):
    model = HRFormer('tiny')
    with pytest.raises(FileNotFoundError, match='nowhere'):
        mmengine_load(model, 'mmhrformer://nowhere.pth')
    torch.save({'fc.weight': torch.zeros(2, 2)}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='not an HRFormer checkpoint in a known format'):
        mmengine_load(model, f'mmhrformer://{tmp_path}/other.pth')


def test_what_is_told_of_the_data_comes_along_if_it_is_plain(tmp_path):
    """mmseg's ``init_model`` asks for the classes."""
    tensors = {f'backbone.{name}': tensor for name, tensor in HRFormer('tiny').state_dict().items()}
    meta = dict(classes=('road', 'sky'), palette=[[0, 0, 0], [1, 2, 3]])
    for told, expected in (
        (meta, dict(dataset_meta=meta)),
        (dict(meta, sigmas=np.ones(2)), {}),  # an array is not built from a file
        ({}, {}),
    ):
        torch.save(dict(meta=dict(dataset_meta=told), state_dict=tensors), tmp_path / 'a.pth')
        content = CheckpointLoader.load_checkpoint(f'mmhrformer://{tmp_path / "a.pth"}')
        assert content['meta'] == expected

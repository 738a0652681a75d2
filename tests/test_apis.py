"""One-line calls: models by name, and in mmpretrain's own hub."""

from __future__ import annotations

from pathlib import Path

import golden
import pytest
import torch

import mmhrformer
from mmhrformer import get_model, register_in_mmpretrain
from mmhrformer.checkpoints import read_zoo
from mmhrformer.launch import read_config

TINY = 'hrformer-tiny_8xb128_in1k'


def test_model_without_weights():
    model = get_model(TINY)
    assert not model.training
    assert model.cfg.model.backbone.arch == 'tiny'
    mean = model.data_preprocessor.mean.flatten().tolist()
    assert mean == pytest.approx([123.675, 116.28, 103.53])
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


def test_options_change_the_config():
    model = get_model(TINY, cfg_options={'model.head.num_classes': 7})
    assert model.head.fc.out_features == 7


@pytest.mark.parametrize(
    'name',
    [
        'td-hm_hrformer-tiny_8xb32-210e_coco-256x192',
        'ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024',
    ],
)
def test_models_for_gpus_are_ready_for_one_cpu(name):
    model = get_model(name)
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())


def test_weights_of_any_dialect(tmp_path):
    file = tmp_path / 'official.pth'
    torch.save(golden.official_checkpoint('pose', 'keys_pose_tiny.json'), file)
    name = 'td-hm_hrformer-tiny_8xb32-210e_coco-256x192'
    model = get_model(name, pretrained=file)
    head = golden.official_state_dict('keys_pose_tiny.json')['keypoint_head.final_layer.weight']
    assert torch.equal(model.head.final_layer.weight, head)
    with pytest.raises(RuntimeError, match='the checkpoint is not of this model'):
        get_model(TINY, pretrained=file)


def test_errors_come_before_anything_is_built():
    with pytest.raises(FileNotFoundError, match='did you mean'):
        get_model('hrformer-tny_8xb128_in1k')
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'nowhere\.pth'"):
        get_model(TINY, pretrained='nowhere.pth')


def test_mmpretrain_knows_our_classifiers(tmp_path, monkeypatch):
    mmpretrain = pytest.importorskip('mmpretrain')
    names = register_in_mmpretrain()
    assert register_in_mmpretrain() == names  # twice is no harm
    configs = [read_config(model.config) for model in read_zoo().values()]
    ours = [Path(cfg.filename).stem for cfg in configs if cfg.default_scope == 'mmpretrain']
    assert names == sorted(ours)
    assert 'swin-tiny_8xb128_in1k' in names
    assert set(names) <= set(mmpretrain.list_models('*_in1k'))
    model = mmpretrain.get_model('hrformer-tiny-no-dwconv_8xb128_in1k')
    assert type(model.backbone) is mmhrformer.HRFormer
    monkeypatch.setenv('MMHRFORMER_CACHE', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='Two steps'):
        mmpretrain.get_model(TINY, pretrained=True)
    content = golden.official_checkpoint('cls', 'keys_cls_tiny.json')
    torch.save(content, tmp_path / f'{TINY}-official.pth')
    model = mmpretrain.get_model(TINY, pretrained=True)
    classifier = golden.official_state_dict('keys_cls_tiny.json')['classifier.weight']
    assert torch.equal(model.head.fc.weight, classifier)
    assert mmhrformer.get_model(TINY, pretrained=True).head.fc.weight.equal(classifier)

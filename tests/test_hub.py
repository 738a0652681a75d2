"""One-line calls: models by name, and in mmpretrain's own hub."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from mmengine.runner import load_checkpoint as mmengine_load
from needs import needs

import mmhrformer
from mmhrformer import get_model, inference, load_checkpoint, register_in_mmpretrain
from mmhrformer.checkpoints import read_zoo
from mmhrformer.configs import read_config

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
    ('config', 'options', 'message'),
    [
        (TINY, {'backbone.arch': 'base'}, 'backbone.arch has no effect: .* no option backbone'),
        pytest.param(
            'td-hm_hrformer-tiny_8xb32-210e_coco-256x192',
            {'codec.sigma': 3},
            'codec.sigma has no effect: codec was copied .*: model.head.decoder',
            marks=needs('mmpose'),
        ),
    ],
)
def test_options_without_effect_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        get_model(config, cfg_options=options)


@pytest.mark.parametrize(
    'name',
    [
        pytest.param('td-hm_hrformer-tiny_8xb32-210e_coco-256x192', marks=needs('mmpose')),
        pytest.param('ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024', marks=needs('mmseg')),
    ],
)
def test_models_for_gpus_are_ready_for_one_cpu(name):
    model = get_model(name)
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())


@pytest.mark.parametrize('pretrained', [False, True])
def test_a_missing_framework_is_named_before_a_download(monkeypatch, pretrained):
    monkeypatch.setitem(sys.modules, 'mmpose', None)
    with pytest.raises(ImportError, match=r"config needs mmpose: .*'mmhrformer\[pose\]'"):
        get_model('td-hm_hrformer-small_8xb32-210e_coco-256x192', pretrained=pretrained)


@needs('mmpose')
def test_weights_of_any_dialect(tmp_path):
    file = tmp_path / 'official.pth'
    torch.save(golden.official_checkpoint('pose', 'keys_pose_tiny.json'), file)
    name = 'td-hm_hrformer-tiny_8xb32-210e_coco-256x192'
    model = get_model(name, pretrained=file)
    head = golden.official_state_dict('keys_pose_tiny.json')['keypoint_head.final_layer.weight']
    assert torch.equal(model.head.final_layer.weight, head)
    with pytest.raises(RuntimeError, match='the checkpoint does not match the model'):
        get_model(TINY, pretrained=file)


def bytes_read() -> int:
    """Number of bytes that this process has read so far."""
    return int(Path('/proc/self/io').read_text().split()[1])


@pytest.mark.skipif(not Path('/proc/self/io').is_file(), reason='counts as Linux does')
def test_checkpoints_are_read_once(tmp_path):
    """Even though the hash and the checksums are verified, and class names looked up."""
    model = get_model(TINY)
    assert model.dataset_meta == {}
    classes = [f'class {i}' for i in range(1000)]
    file = tmp_path / 'a.pth'
    content = dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=classes)))
    torch.save(content, file)
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    file = file.rename(tmp_path / f'a-{digits}.pth')
    image = np.zeros((40, 40, 3), np.uint8)
    for door in (
        lambda: get_model(TINY, pretrained=file).dataset_meta['classes'] == classes,
        lambda: 'pred_class' in inference(TINY, image, file, device='cpu')['predictions'][0],
        lambda: mmengine_load(model, f'mmhrformer://{file}', strict=True),
        lambda: load_checkpoint(model, file).used,
    ):
        before = bytes_read()
        assert door()
        assert 1 <= (bytes_read() - before) / file.stat().st_size < 1.5


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

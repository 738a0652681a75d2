"""Every shipped config loads, builds, and survives being dumped and loaded again."""

from __future__ import annotations

import golden
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmhrformer.launch import config_root, find_config

ALL = sorted(path.relative_to(config_root()) for path in config_root().glob('[!_]*/*.py'))
FLOPS = golden.read_json('params_flops.json')['parameters']
PARAMETERS = {
    'hrformer-tiny_8xb128_in1k': FLOPS['cls tiny']['total'],
    'hrformer-small_8xb128_in1k': FLOPS['cls small']['total'],
    'hrformer-base_8xb128_in1k': FLOPS['cls base']['total'],
    'td-hm_hrformer-tiny_8xb32-210e_coco-256x192': FLOPS['pose tiny']['total'],
    'td-hm_hrformer-small_8xb32-210e_coco-256x192': FLOPS['pose small']['total'],
    'td-hm_hrformer-small_8xb32-210e_coco-384x288': FLOPS['pose small']['total'],
    'td-hm_hrformer-base_8xb32-210e_coco-256x192': FLOPS['pose base']['total'],
    'td-hm_hrformer-base_8xb8-210e_coco-384x288': FLOPS['pose base']['total'],
    'ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024': FLOPS['seg small w7 19cls']['total'],
    'ocrnet_hrformer-base_8xb1-80k_cityscapes-512x1024': FLOPS['seg base w7 19cls']['total'],
    'ocrnet_hrformer-base-w15_8xb1-80k_cityscapes-512x1024': FLOPS['seg base w15 19cls']['total'],
}


@pytest.mark.parametrize('path', ALL, ids=lambda path: path.stem)
def test_config_builds_and_reloads(path, tmp_path):
    cfg = Config.fromfile(config_root() / path)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    parameters = sum(p.numel() for p in model.parameters())
    if path.parts[0] != 'demo':
        assert parameters == PARAMETERS[path.stem]
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


def test_names_are_unique():
    names = [path.name for path in ALL]
    assert len(names) == len(set(names))
    assert {path.stem for path in ALL if path.parts[0] != 'demo'} == set(PARAMETERS)


def test_find_config_proposes_similar_names():
    assert find_config('hrformer-tiny_8xb128_in1k.py').parent.name == 'hrformer_cls'
    with pytest.raises(FileNotFoundError, match=r'did you mean .*hrformer-tiny_8xb128_in1k'):
        find_config('hrformer-tny_8xb128_in1k')


STOCK = {
    'mmpretrain': ('hrnet/hrnet-w32_4xb32_in1k.py', (3, 64, 64)),
    'mmpose': (
        'body_2d_keypoint/topdown_heatmap/coco/td-hm_hrnet-w32_8xb64-210e_coco-256x192.py',
        (3, 64, 64),
    ),
    'mmseg': ('hrnet/fcn_hr48_4xb2-80k_cityscapes-512x1024.py', (3, 64, 64)),
}


@pytest.mark.parametrize('scope', STOCK)
def test_backbone_dropped_into_a_stock_config(scope):
    """Only the backbone's type and its channels change; nothing is imported by hand."""
    import importlib.util
    from pathlib import Path

    config, shape = STOCK[scope]
    package = Path(importlib.util.find_spec(scope).origin).parent
    cfg = Config.fromfile(package / '.mim/configs' / config)
    channels = (32, 64, 128, 256)
    cfg.model.backbone = dict(type='mmhrformer.HRFormer', arch='small')
    if scope == 'mmpretrain':
        cfg.model.neck[0].in_channels = channels
    elif scope == 'mmpose':
        cfg.model.backbone.update(out_indices=(0,), upsample='bilinear')
    else:
        cfg.model.pretrained = None
        cfg.model.decode_head.update(in_channels=channels, channels=sum(channels))
        cfg.model.decode_head.norm_cfg = dict(type='BN')
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg.model)
        assert type(model.backbone).__module__.startswith('mmhrformer.')
        out = model(torch.rand(2, *shape), None, mode='tensor')
    assert torch.isfinite(out).all()
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


SIZES = [(32, 32), (33, 47), (97, 161)]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(
    'config', [path for path in ALL if path.parts[0] == 'demo'], ids=lambda path: path.stem
)
def test_whole_models_take_any_size(config, size):
    model = golden.build(config).eval()
    with torch.no_grad():
        out = model(torch.rand(1, 3, *size), None, mode='tensor')
    if 'digits' in config.stem:
        assert out.shape == (1, 10)
    else:
        quarter = tuple(-(-side // 4) for side in size)
        assert out.shape[-2:] == quarter

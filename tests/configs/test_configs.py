"""Every shipped config loads, survives being dumped, and has no option that nothing reads."""

from __future__ import annotations

import importlib
import inspect
from functools import cache

import golden
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import HOOKS, METRICS, MODELS, VISUALIZERS, DefaultScope
from needs import may_need
from torch.utils.data import DataLoader

from mmhrformer.configs import config_root, find_config
from mmhrformer.engine.config_check import dead_options, late_variables

pytestmark = may_need('mmpose', 'mmseg', 'mmdet')

ALL = sorted(path.relative_to(config_root()) for path in config_root().glob('[!_]*/*.py'))


@pytest.mark.parametrize('path', ALL, ids=lambda path: path.stem)
def test_config_reloads(path, tmp_path):
    cfg = golden.read_config(path)
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


@pytest.fixture(scope='module')
def _files_are_parsed_once():
    """Most files are bases of several configs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, 'fromfile', cache(Config.fromfile))
        yield


@pytest.mark.usefixtures('_files_are_parsed_once')
@pytest.mark.parametrize('path', ALL, ids=lambda path: path.stem)
def test_no_option_is_dead(path, tmp_path):
    """Top-level options are read by something; all others are arguments of what is built."""
    cfg = golden.read_config(path)
    assert dead_options(cfg) == late_variables(cfg) == {}
    register = importlib.import_module(f'{cfg.default_scope}.utils')
    register.register_all_modules(init_default_scope=False)
    metrics = [cfg.val_evaluator, cfg.test_evaluator]
    hooks = [*cfg.default_hooks.values(), *cfg.get('custom_hooks', [])]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        VISUALIZERS.build(dict(cfg.visualizer, name=path.stem, save_dir=str(tmp_path)))
        for mode in ('train', 'val', 'test'):
            loader = cfg[f'{mode}_dataloader']
            assert set(loader) - {'dataset', 'sampler'} <= set(LOADER_OPTIONS)
            Compose(loader.dataset.pipeline)
        if 'tta_pipeline' in cfg:
            Compose(cfg.tta_pipeline)
        for hook in hooks:
            HOOKS.build(hook)
        for metric in metrics:
            METRICS.build({k: v for k, v in metric.items() if k != 'ann_file'})


LOADER_OPTIONS = inspect.signature(DataLoader.__init__).parameters


@pytest.mark.parametrize('path', [path for path in ALL if path.stem.startswith('td-hm')], ids=str)
def test_pose_configs_name_what_the_inferencers_of_mmpose_look_for(path):
    """``MMPoseInferencer`` reads them at the top, not in the dataset."""
    cfg = golden.read_config(path)
    dataset = cfg.test_dataloader.dataset
    assert (cfg.dataset_type, cfg.data_mode) == (dataset.type, dataset.data_mode)


def test_inferencer_of_mmpose_takes_our_configs():
    from mmpose.apis import MMPoseInferencer

    config = find_config('td-hm_hrformer-demo_1xb16-2e_figures-96x128')
    inferencer = MMPoseInferencer(str(config), device='cpu', det_model='whole_image')
    (person,) = next(inferencer(np.zeros((80, 60, 3), np.uint8)))['predictions'][0]
    assert np.shape(person['keypoints']) == (17, 2)


def test_names_are_unique():
    names = [path.name for path in ALL]
    assert len(names) == len(set(names))


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
    """Only the backbone's type and channels change; nothing is imported explicitly."""
    from pathlib import Path

    config, shape = STOCK[scope]
    package = Path(pytest.importorskip(scope).__file__).parent
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

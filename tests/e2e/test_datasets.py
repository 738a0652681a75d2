"""Every data set, laid out as the real one, through the stock dataset classes and loops."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from tiny_datasets import make

from mmhrformer.configs import find_config

pytestmark = pytest.mark.e2e

SIDE = 128  # instead of 520 pixels, and of crops of 512x1024
CONFIGS = {
    'imagenet': 'hrformer-tiny_8xb128_in1k',
    'coco': 'td-hm_hrformer-tiny_8xb32-210e_coco-256x192',
    'cityscapes': 'ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024',
    'pascal_context': 'ocrnet_hrformer-small_8xb2-60k_pascal-context-59-520x520',
    'coco_stuff10k': 'ocrnet_hrformer-small_8xb2-60k_coco-stuff10k-520x520',
    'ade20k': 'ocrnet_hrformer-small_8xb2-150k_ade20k-520x520',
}


def load(name: str, work_dir: Path) -> Config:
    """A config for a few images on the CPU."""
    cfg = Config.fromfile(find_config(name))
    cfg.work_dir = str(work_dir)
    # Visualizers are shared by name, also among the runs of a process.
    cfg.visualizer.name = str(work_dir)
    cfg.model.backbone.init_cfg = None
    cfg.optim_wrapper.type = 'OptimWrapper'
    for mode in ('train', 'val', 'test'):
        loader = cfg[f'{mode}_dataloader']
        loader.update(num_workers=0, persistent_workers=False, batch_size=2)
    if cfg.default_scope == 'mmseg':
        cfg.train_cfg.update(max_iters=2, val_interval=2)
        cfg.model.decode_head[1].loss_decode.pop('min_kept', None)
        cfg.model.data_preprocessor.size = (SIDE, SIDE)
        pipelines = [cfg[f'{mode}_dataloader'].dataset.pipeline for mode in ('train', 'val')]
        for step in (s for p in [*pipelines, cfg.tta_pipeline] for s in p):
            for option in {'scale', 'crop_size', 'size'} & set(step):
                step[option] = (100000, SIDE) if option == 'scale' else (SIDE, SIDE)
        cfg.test_dataloader = cfg.val_dataloader
        for mode in ('val', 'test'):
            cfg[f'{mode}_dataloader'].batch_size = 1
    else:
        cfg.train_cfg.update(max_epochs=1, val_interval=1)
    return cfg


def run(cfg: Config, task: str) -> dict:
    """Train with validation, or test; as the stock tools do, in this process."""
    modules = importlib.import_module(f'{cfg.default_scope}.utils')
    modules.register_all_modules(init_default_scope=False)
    cfg.experiment_name = f'{Path(cfg.work_dir).parent.name}-{Path(cfg.work_dir).name}'
    return getattr(Runner.from_cfg(cfg), task)()


def scalars(work_dir: Path) -> list[dict]:
    (file,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('data', CONFIGS)
def test_train_validate_test(data, folder):
    make(data, folder / 'data')
    cfg = load(CONFIGS[data], folder / 'train')
    run(cfg, 'train')
    checkpoint = Path((folder / 'train/last_checkpoint').read_text())
    logged = scalars(folder / 'train')
    metric = {'imagenet': 'accuracy/top1', 'coco': 'coco/AP'}.get(data, 'mIoU')
    assert metric in logged[-1]
    cfg = load(CONFIGS[data], folder / 'test')
    cfg.load_from = str(checkpoint)
    assert run(cfg, 'test')[metric] == pytest.approx(logged[-1][metric], abs=1e-4)
    if 'tta_pipeline' in cfg:
        cfg = load(CONFIGS[data], folder / 'tta')
        cfg.load_from = str(checkpoint)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(**cfg.tta_model, module=cfg.model)
        assert 0 <= run(cfg, 'test')[metric] <= 100


def test_submission_for_the_coco_server(folder):
    make('coco', folder / 'data')
    cfg = load('td-hm_hrformer-small_8xb32-210e_coco-test-dev-384x288', folder / 'test')
    run(cfg, 'test')
    people = json.loads((folder / 'coco_test-dev2017.keypoints.json').read_text())
    assert people
    assert {'image_id', 'category_id', 'keypoints', 'score'} <= set(people[0])
    assert all(len(person['keypoints']) == 51 for person in people)

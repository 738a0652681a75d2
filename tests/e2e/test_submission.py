"""The file for COCO's server, from images without annotations and the boxes of a detector."""

from __future__ import annotations

import json

import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from mmpose.utils import register_all_modules
from tiny_datasets import make

from mmhrformer.configs import find_config

pytestmark = pytest.mark.e2e


def test_submission_for_the_coco_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make('coco', tmp_path / 'data')
    cfg = Config.fromfile(find_config('td-hm_hrformer-small_8xb32-210e_coco-test-dev-384x288'))
    cfg.work_dir = cfg.visualizer.name = str(tmp_path / 'test')  # these are shared by name
    cfg.model.backbone.init_cfg = None
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False, batch_size=2)
    register_all_modules(init_default_scope=False)
    Runner.from_cfg(cfg).test()
    people = json.loads((tmp_path / 'coco_test-dev2017.keypoints.json').read_text())
    assert people
    assert {'image_id', 'category_id', 'keypoints', 'score'} <= set(people[0])
    assert all(len(person['keypoints']) == 51 for person in people)

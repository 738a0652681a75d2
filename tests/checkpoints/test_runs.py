"""Checkpoints that stock training runs leave, through every door, and none of them runs code."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import numpy as np
import places
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.runner import load_checkpoint as mmengine_load
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmhrformer import HRFormer, get_model, load_checkpoint
from mmhrformer.checkpoints import read_checkpoint
from mmhrformer.cli.launch import resolve_checkpoint

TINY = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)


class Trained(BaseModel):
    """The smallest model that a runner trains."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = HRFormer(arch=TINY)
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, images: Tensor, mode: str = 'loss') -> dict[str, Tensor]:
        return dict(loss=self.head(self.backbone(images)[0]).square().mean())

    def train_step(self, data: Tensor, optim_wrapper) -> dict[str, Tensor]:
        losses = self(data)
        optim_wrapper.update_params(losses['loss'])
        return losses


class Noise(Dataset):
    """Random images, with the metainfo of a stock dataset for pose."""

    metainfo = dict(classes=('person',), sigmas=np.ones(17, np.float32), colors={0: np.uint8([1])})

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        return torch.rand(3, 32, 32)


def train(work_dir: Path, epochs: int, **options) -> Runner:
    """Train as the shipped pose recipe does, with averaged weights, too."""
    runner = Runner(
        model=Trained(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=Noise(),
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_size=2,
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.001, by_epoch=False, end=2),
            dict(type='MultiStepLR', milestones=[170, 200], gamma=0.1, by_epoch=True),
        ],
        custom_hooks=[dict(type='EMAHook')],
        default_scope='mmengine',
        experiment_name=f'{work_dir.name}-{epochs}',
        **options,
    )
    runner.train()
    return runner


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Runner:
    return train(tmp_path_factory.mktemp('run'), 1)


class Code:
    """A malicious object: unpickling it creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def through_test_tool(file: Path) -> dict:
    model = Trained()
    mmengine_load(model, resolve_checkpoint(str(file)), strict=True)
    return model.state_dict()


def through_load_from(file: Path) -> dict:
    model = Trained()
    model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=f'mmhrformer://{file}', prefix='backbone.'
    )
    model.init_weights()
    model.head.load_state_dict(read_checkpoint(file)['state_dict'], strict=False)
    return model.backbone.state_dict(prefix='backbone.')


def through_load_checkpoint(file: Path) -> dict:
    model = Trained()
    report = load_checkpoint(model, file, strict=True)
    assert 'ema_state_dict' in report.others
    return model.state_dict()


def through_get_model(file: Path) -> dict:
    MODELS.register_module(name='TrainedByTests', module=Trained, force=True)
    config = file.with_name('config.py')
    config.write_text("default_scope = 'mmengine'\nmodel = dict(type='TrainedByTests')\n")
    model = get_model(config, file)
    assert model.dataset_meta['classes'] == ('person',)
    return model.state_dict()


def through_convert_checkpoint(file: Path) -> dict:
    tool = places.ROOT / 'tools/convert_checkpoint.py'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [tool.name, str(file), f'{file}.new', '--overwrite'])
        runpy.run_path(str(tool), run_name='__main__')
    return read_checkpoint(f'{file}.new')['state_dict']


DOORS = [
    through_convert_checkpoint,
    through_get_model,
    through_load_checkpoint,
    through_load_from,
    through_test_tool,
]


@pytest.mark.parametrize('door', DOORS)
def test_a_run_of_the_pose_recipe_through_every_door(run, door, tmp_path):
    path = Path(run.work_dir, 'epoch_1.pth')
    content = torch.load(path, 'cpu', weights_only=False)
    assert content['param_schedulers'][1]['milestones'] == {170: 1, 200: 1}
    # The averaged weights, and not those that the run goes on with.
    averaged = content['state_dict']
    assert any(not torch.equal(t, averaged[k]) for k, t in run.model.state_dict().items())
    content['planted'] = Code(tmp_path / 'made')
    torch.save(content, tmp_path / 'planted.pth')
    for file in (path, tmp_path / 'planted.pth'):
        for key, tensor in door(file).items():
            assert torch.equal(tensor, averaged[key]), key
    assert not (tmp_path / 'made').exists()


def test_the_run_goes_on(run, tmp_path):
    """Also with torch 2.6 and later, which loads only allowed types."""
    file = Path(run.work_dir, 'epoch_1.pth')
    again = train(tmp_path, 2, resume=True, load_from=str(file))
    assert again.iter == 4
    assert again.param_schedulers[1].milestones == {170: 1, 200: 1}

"""From a folder of photographs to a tested checkpoint, with the documented configs and commands."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, DefaultScope
from mmengine.runner import Runner, load_checkpoint
from needs import needs
from pages import OWN_DATA, call, commands_of, write_clone
from photographs import make_cats, make_flowers, make_leaves
from places import ROOT
from torch.nn.modules.batchnorm import _BatchNorm

from mmhrformer.engine.config_check import dead_options, late_variables
from mmhrformer.models import ARCHS

pytestmark = needs('mmpretrain', 'mmpose', 'mmseg')

COMMANDS = commands_of(OWN_DATA)
DATA = {'flowers': make_flowers, 'cats': make_cats, 'leaves': make_leaves}
LOADERS = [f'{split}_dataloader' for split in ('train', 'val', 'test')]
FEW = dict(num_modules=(1, 1, 1), num_blocks=1)  # streams as the heads expect, but few blocks


@pytest.fixture(scope='module')
def clone(tmp_path_factory) -> Path:
    """A folder with our configs, those of the page, and the data that they name."""
    folder = tmp_path_factory.mktemp('clone')
    write_clone(folder)
    for name, make in DATA.items():
        make(folder / 'data' / name)
    return folder


@pytest.fixture(autouse=True)
def _in_the_clone(clone, monkeypatch):
    """Run commands in the clone, with an HRFormer-S of few blocks."""
    monkeypatch.chdir(clone)
    monkeypatch.setattr('mmhrformer.configs.config_root', lambda: clone / 'configs')
    monkeypatch.setitem(ARCHS, 'small', dict(ARCHS['small'], **FEW))


def read(name: str) -> Config:
    return Config.fromfile(f'configs/my/{name}.py')


def adapt(words: list[str], name: str, last: str) -> list[str]:
    """A command for flowers, adapted to other data as the page says."""
    words = [word.replace('my_flowers', name).replace('epoch_30', last) for word in words]
    no_weights = 'load_from=None' if name == 'my_flowers' else 'model.backbone.init_cfg=None'
    return [no_weights if word == 'load_from=None' else word for word in words]


EPOCH = ('train_cfg.max_epochs=1', 'train_cfg.val_interval=1')
ITERATION = ('train_cfg.max_iters=1', 'train_cfg.val_interval=1',
             'default_hooks.checkpoint.interval=1', 'train_dataloader.batch_size=2')  # fmt: skip
NARROW = [f'model.decode_head.{i}.channels=32' for i in (0, 1)]


@pytest.fixture
def tensorboard(monkeypatch) -> list[tuple]:
    """What is written to TensorBoard, with a stand-in so that it need not be installed."""
    written = []

    class SummaryWriter(SimpleNamespace):
        def add_text(self, *args):
            pass

        def add_scalar(self, *args):
            written.append(args)

        def close(self):
            pass

    module = ModuleType('torch.utils.tensorboard')
    module.SummaryWriter = lambda folder: SummaryWriter()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return written


@pytest.mark.parametrize(
    ('name', 'last', 'metric', 'short', 'shape'),
    [
        ('my_flowers', 'epoch_1', 'accuracy/top1', EPOCH, []),
        ('my_cats', 'epoch_1', 'coco/AP', EPOCH, []),
        ('my_small_leaves', 'iter_1', 'mIoU', ITERATION, NARROW),
    ],
)
def test_from_photographs_to_a_tested_checkpoint(
    name, last, metric, short, shape, tensorboard, monkeypatch
):
    (train,) = (words for words in COMMANDS if words[-1] == 'load_from=None')
    (test,) = (w for w in COMMANDS if w[1] == 'tools/test.py')
    off = [f'{loader}.{o}' for loader in LOADERS for o in ('num_workers=0',
           'persistent_workers=False')]  # fmt: skip
    more = []
    if name == 'my_cats':  # with the options of fine-tuning and logging
        (rates,) = (w for w in COMMANDS if 'layer_decay_rate' in w[-1])
        (board,) = (w for w in COMMANDS if 'Tensorboard' in w[-1])
        assert rates[:-1] == board[:-1] == ['python', 'tools/train.py', name, '--cfg-options']
        more = [rates[-1], board[-1]]
    call([*adapt(train, name, last), *short, *shape, *off, *more], monkeypatch)
    call([*adapt(test, name, last), '--cfg-options', *shape, *off], monkeypatch)
    tested = [json.loads(file.read_text()) for file in Path('work_dirs', name).glob('*/*.json')]
    value = tested[-1][metric]
    content = torch.load(f'work_dirs/{name}/{last}.pth')
    groups = content['optimizer']['param_groups']
    if more:
        found = dict(args[:2] for args in tensorboard)
        assert found['loss'] > 0
        assert len({group['initial_lr'] for group in groups}) == 5  # stem, three blocks, head
    else:
        (scalars,) = Path('work_dirs', name).glob('*/vis_data/scalars.json')
        *_, found = map(json.loads, scalars.read_text().splitlines())
        assert len(groups) == 2
    assert value == pytest.approx(found[metric], abs=1e-3)


# ---------------------------------------------------------------- a step of each variant


def train_step(cfg: Config) -> tuple[torch.nn.Module, dict]:
    """Build model and data, and compute the gradients of two images."""
    assert dead_options(cfg) == late_variables(cfg) == {}
    if cfg.get('data_preprocessor'):
        cfg.model.data_preprocessor = cfg.data_preprocessor
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
        data = model.data_preprocessor(pseudo_collate([dataset[0], dataset[1]]), training=True)
        losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    assert torch.isfinite(losses)
    return model, data


@pytest.mark.parametrize(
    ('name', 'size'),
    [
        ('my_wide_flowers', (192, 192)),
        ('my_square_cats', (256, 256)),
        ('my_simcc_cats', (256, 192)),
        ('my_segformer_leaves', (256, 256)),
    ],
)
def test_other_sizes_and_heads(name, size):
    cfg = read(name)
    cfg.model.backbone.init_cfg = None
    if name == 'my_segformer_leaves':
        cfg.model.decode_head.channels = 32
    model, data = train_step(cfg)
    assert any(p.grad.abs().sum() > 0 for p in model.backbone.stage4.parameters())
    assert data['inputs'].shape[2:] == size
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        val = DATASETS.build(cfg.val_dataloader.dataset)
    assert len(val) == len(data['data_samples']) * (3 if 'flowers' in name else 1)
    short = min(val[0]['inputs'].shape[1:])
    assert short == size[1]


def test_own_leaves_in_the_size_of_the_paper():
    """The same model is trained above, at another size."""
    cfg = read('my_leaves')
    assert dead_options(cfg) == late_variables(cfg) == {}
    with DefaultScope.overwrite_default_scope('mmseg'):
        samples = [DATASETS.build(cfg[f'{s}_dataloader'].dataset)[0] for s in ('train', 'val')]
        labels = torch.cat([s['data_samples'].gt_sem_seg.data.flatten() for s in samples])
    assert samples[0]['inputs'].shape[1:] <= cfg.model.data_preprocessor['size'] == (520, 520)
    assert set(labels.tolist()) == {0, 1, 2, 255}
    assert [head.num_classes for head in cfg.model.decode_head] == [3, 3]


def test_lora(tmp_path):
    """Only updates and head are trained and saved; outputs on the frozen weights are the same."""
    cfg = read('my_lora_cats')
    backbone = dict(cfg.model.backbone.module, init_cfg=None)
    with DefaultScope.overwrite_default_scope('mmpose'):
        weights = revert_sync_batchnorm(MODELS.build(backbone)).state_dict()
    torch.save(dict(state_dict=weights), tmp_path / 'imagenet.pth')
    cfg.model.backbone.module.init_cfg.checkpoint = f'mmhrformer://{tmp_path}/imagenet.pth'
    model, data = train_step(cfg)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition('.')[0] for name in learned} == {'backbone', 'head'}
    # Down and up, of two projections, in the blocks of 2 + 3 + 4 streams.
    assert sum('lora' in name for name in learned) == 2 * 2 * 9
    assert all('lora' in name for name in learned if name.startswith('backbone.'))
    norms = [m for m in model.backbone.modules() if isinstance(m, _BatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    torch.optim.SGD(model.parameters(), 1.0).step()
    saved = model.state_dict()
    assert all('lora' in name for name in saved if name.startswith('backbone.'))
    with DefaultScope.overwrite_default_scope('mmpose'):
        again = revert_sync_batchnorm(MODELS.build(cfg.model))
    again.load_state_dict(saved, strict=False)
    outs = [m.train(False)(data['inputs'], None, mode='tensor') for m in (model, again)]
    torch.testing.assert_close(*outs, atol=0, rtol=0)


def test_swaps_and_sigmas(monkeypatch):
    cfg = read('my_cats')
    with DefaultScope.overwrite_default_scope('mmpose'):
        for step in cfg.train_pipeline:
            if step.type == 'RandomFlip':
                step.prob = 1.0
        loader = dict(cfg.train_dataloader.dataset, pipeline=cfg.train_pipeline[:4])
        dataset = DATASETS.build(loader)
    assert dataset.metainfo['flip_indices'] == [0, 2, 1, 4, 3]
    assert dataset.metainfo['sigmas'].tolist() == pytest.approx([0.03] * 5)
    (before,), (after,) = dataset.get_data_info(0)['keypoints'], dataset[0]['keypoints']
    width = dataset[0]['img_shape'][1]
    assert after[[0, 2, 1, 4, 3]].tolist() == [[width - 1 - x, y] for x, y in before.tolist()]
    (command,) = (words for words in COMMANDS if words[1] == 'tools/browse_dataset.py')
    call(command, monkeypatch)
    assert len(list(Path('pictures').iterdir())) == len(dataset)


def test_weights_and_biases_beside_the_files(monkeypatch, tmp_path):
    """The config is checked and stored, losses arrive at both backends."""
    wandb, calls = ModuleType('wandb'), []
    wandb.init = lambda **options: calls.append(('init', options))
    wandb.log = lambda values, **options: calls.append(('log', values))
    wandb.config = SimpleNamespace(update=lambda values, **options: None)
    wandb.run = SimpleNamespace(log_code=lambda **options: None)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    cfg, plain = read('my_logged_cats'), read('my_cats')
    assert dead_options(cfg) == late_variables(cfg) == {}
    assert cfg.visualizer.vis_backends[:-1] == plain.visualizer.vis_backends
    with DefaultScope.overwrite_default_scope('mmpose'):
        visualizer = VISUALIZERS.build(dict(cfg.visualizer, save_dir=str(tmp_path), name='wandb'))
    visualizer.add_config(cfg)
    visualizer.add_scalars(dict(loss=0.5), step=1)
    assert calls == [('init', dict(project='cats', dir=str(tmp_path / 'vis_data'))),
                     ('log', dict(loss=0.5))]  # fmt: skip
    assert json.loads((tmp_path / 'vis_data/scalars.json').read_text())['loss'] == 0.5
    # From the command line, in place of the files.
    (command,) = (words for words in COMMANDS if 'Wandb' in words[-1])
    plain.merge_from_dict(dict([command[-1].split('=')]))
    assert dead_options(plain) == late_variables(plain) == {}
    assert plain.visualizer.vis_backends[0] == dict(type='WandbVisBackend')


# ---------------------------------------------------------------- where to start from


@pytest.mark.parametrize('name', ['my_flowers', 'my_cats', 'my_leaves'])
def test_without_a_clone(name, clone, tmp_path, monkeypatch):
    """A base that print_config wrote next to the config gives the same config."""
    expected = read(name)
    monkeypatch.chdir(tmp_path)
    text = (clone / f'configs/my/{name}.py').read_text()
    base = re.search(r"_base_ = \['\.\./\w+/(.*)\.py'\]", text)
    write, train = (words for words in COMMANDS if words[1:3] == ['-m', 'mmhrformer'])
    assert write[4] == write[6].removesuffix('.py')
    call([*write[:4], base[1], '--out', f'{base[1]}.py'], monkeypatch)
    (tmp_path / f'{name}.py').write_text(text.replace(base[0], f"_base_ = ['{base[1]}.py']"))
    started = []
    runner = SimpleNamespace(train=lambda: started.append('train'))
    monkeypatch.setattr(Runner, 'from_cfg', lambda cfg: started.append(cfg) or runner)
    call([word.replace('my_flowers', name) for word in train], monkeypatch)
    flat, ran = Config.fromfile(f'{name}.py'), started[0].to_dict()
    assert flat.to_dict() == expected.to_dict()
    assert {key: ran[key] for key in expected.to_dict()}.keys() == expected.keys()
    assert started[1:] == ['train']
    assert dead_options(flat) == late_variables(flat) == {}


def test_own_classes_keep_backbone_and_neck(tmp_path):
    """All but the last layer of the published classifier is loaded."""
    cfg = read('my_flowers')
    assert cfg.load_from == 'mmhrformer://hrformer-small_8xb128_in1k'
    published = Config.fromfile(ROOT / 'configs/hrformer_cls/hrformer-small_8xb128_in1k.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        theirs, mine = (MODELS.build(one.model) for one in (published, cfg))
    torch.save(dict(state_dict=theirs.state_dict(), meta={}), tmp_path / 'published.pth')
    mine.init_weights()
    load_checkpoint(mine, f'mmhrformer://{tmp_path}/published.pth')  # as the runner does
    weights, expected = mine.state_dict(), theirs.state_dict()
    for name in expected:
        if not name.startswith('head.'):
            assert torch.equal(weights[name], expected[name]), name
    assert mine.head.fc.out_features == 3

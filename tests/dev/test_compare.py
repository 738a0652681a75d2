"""dev/compare.py: what it trains, and what it reads."""

from __future__ import annotations

import json
from pathlib import Path

import compare as tool
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from needs import may_need

from mmhrformer.configs import config_root, find_config

pytestmark = may_need('mmpose', 'mmseg')

SIZES = dict(cls=(32, 32), pose=(128, 96), seg=(96, 96))
SEG = 'ocrnet_hrformer-tiny{}_8xb2-60k_pascal-context-59-520x520'


def model_of(cfg: Config):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model).eval()


# ------------------------------------------------------------------ what is trained


@pytest.mark.parametrize(
    ('name', 'demo'),
    [
        ('hrformer-tiny_8xb128_in1k', 'hrformer-demo_1xb64-6e_digits'),
        ('td-hm_hrformer-tiny_8xb32-210e_coco-256x192',
         'td-hm_hrformer-demo_1xb16-2e_figures-96x128'),
        (SEG.format(''), 'ocrnet_hrformer-demo_1xb16-100_scenes-96x96'),
    ],
)  # fmt: skip
def test_hrformer_itself_is_the_demo(name, demo):
    _, cfg = tool.demo_config(name)
    expected = Config.fromfile(find_config(demo)).to_dict()
    expected.pop('arch')
    assert cfg.to_dict() == expected


def test_what_differs_is_put_into_the_demo():
    plain = tool.demo_config(SEG.format(''))[1].to_dict()
    ablated = tool.demo_config(SEG.format('-shifted'))[1].to_dict()
    backbone = ablated['model'].pop('backbone')
    before = plain['model'].pop('backbone')
    assert ablated == plain
    differing = {key for key in backbone if backbone[key] != before.get(key)}
    assert differing == {'attn_cfg', 'ffn_cfg'}


@pytest.mark.parametrize(
    'name',
    [
        'hrformer-tiny-shifted-dwconv_8xb128_in1k',
        'hrnet-tiny_8xb128_in1k',
        'intrawin-tiny-dwconv_8xb128_in1k',
        'td-hm_hrnet-base_8xb32-210e_coco-256x192',
        'td-hm_deit-base_8xb32-210e_coco-256x192',
        'td-hm_swin-base_8xb32-210e_coco-256x192',
        'ocrnet_hrnet-small_8xb2-60k_pascal-context-59-520x520',
        'ocrnet-v3_hrformer-base-w15_8xb2-60k_pascal-context-59-520x520',
        'ocrnet_hrformer-base-w15-13-11-9_8xb1-80k_cityscapes-512x1024',
    ],
)
def test_every_kind_of_model_is_small_and_fits(name):
    task, cfg = tool.demo_config(name)
    model = model_of(cfg)
    assert 0.2e6 < sum(p.numel() for p in model.backbone.parameters()) < 0.8e6
    height, width = SIZES[task]
    with torch.no_grad():
        out = model(torch.rand(1, 3, height, width), None, mode='tensor')
    shapes = dict(cls=(1, 10), pose=(1, 17, height // 4, width // 4),
                  seg=(1, 8, height // 4, width // 4))  # fmt: skip
    assert out.shape == shapes[task]
    if 'v3' in name:
        assert model.decode_head[1].bottleneck[0].kernel_size == (7, 7)


def test_every_shipped_config_can_be_compared():
    for path in config_root().glob('[!_]*/*.py'):
        if path.parent.name not in ('demo', 'hrformer_det'):
            tool.demo_config(str(path))


def test_length():
    _, cfg = tool.demo_config('hrformer-tiny_8xb128_in1k')
    tool.set_length(cfg, 3)
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler.end) == (3, 3)
    _, cfg = tool.demo_config(SEG.format(''))
    tool.set_length(cfg, 60)
    assert cfg.train_cfg.max_iters == cfg.train_cfg.val_interval == 60
    assert [schedule.end for schedule in cfg.param_scheduler] == [11, 60]


def test_what_cannot_be_compared(tmp_path):
    config = tmp_path / 'other.py'
    config.write_text("default_scope = 'mmdet'")
    with pytest.raises(ValueError, match=r"default_scope='mmdet': choose one of \['mmpretrain'"):
        tool.demo_config(str(config))
    config.write_text(
        "default_scope = 'mmpose'\ncustom_imports = dict(imports=['mmhrformer'])\n"
        "model = dict(backbone=dict(type='ResNet'))"
    )
    with pytest.raises(ValueError, match=r"backbone\.type='ResNet': expected HRFormer"):
        tool.demo_config(str(config))
    with pytest.raises(FileNotFoundError, match='no config'):
        tool.demo_config('no-such-config')


# ------------------------------------------------------------------ what comes out


def write_log(work: Path, lines: list[dict]) -> None:
    folder = work / '20200101_000000/vis_data'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))


@pytest.fixture
def trainings(monkeypatch):
    """Pretend to train; what was trained is listed."""
    done = []

    def run_tool(name, args, log, threads):
        done.append(Path(args[0]).parent.name)
        metrics = {'accuracy/top1': 40.0 + len(done), 'mIoU': 50.0, 'step': 10}
        write_log(Path(args[-1]), [dict(loss=0.2, step=5), metrics])

    monkeypatch.setattr(tool, 'run_tool', run_tool)
    monkeypatch.setattr(tool.demo_data, 'TASKS', dict.fromkeys(SIZES, lambda folder: folder))
    return done


def test_runs_are_listed(trainings, tmp_path, monkeypatch, capsys):
    names = ['hrformer-tiny_8xb128_in1k', 'hrnet-tiny_8xb128_in1k', SEG.format('-no-dwconv')]
    args = ['compare.py', *names, '--out', str(tmp_path), '--epochs', '2', '--seeds', '0', '1']
    monkeypatch.setattr('sys.argv', args)
    tool.main()
    assert trainings == [f'{name}-{seed}' for seed in (0, 1) for name in names]
    results = json.loads((tmp_path / 'results.json').read_text())
    assert [result['metric'] for result in results] == [41.0, 42.0, 50.0, 44.0, 45.0, 50.0]
    assert 'hrnet-tiny_8xb128_in1k, seed 1: top-1 accuracy 45.0 %' in capsys.readouterr().out
    cfg = Config.fromfile(tmp_path / f'{names[0]}-1/config.py')
    assert (cfg.train_cfg.max_epochs, cfg.randomness.seed) == (2, 1)


def test_a_training_without_validation_is_an_error(tmp_path):
    write_log(tmp_path, [dict(loss=1.0, step=1)])
    with pytest.raises(tool.DemoError, match='has no accuracy/top1'):
        tool.read_metric('cls', tmp_path)


def test_errors_are_one_line(monkeypatch):
    monkeypatch.setattr('sys.argv', ['compare.py', 'hrnet-tny_8xb128_in1k'])
    with pytest.raises(SystemExit, match=r'compare\.py: there is no config .* did you mean'):
        tool.main()

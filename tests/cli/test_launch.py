"""Preparations of our tools before a stock tool runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import golden
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from needs import needs
from places import ENV, ROOT

from mmhrformer import HRFormer
from mmhrformer.checkpoints import DownloadError
from mmhrformer.cli.launch import resolve_checkpoint, run_stock_tool, stock_tool


def test_checkpoints_are_handed_on_behind_the_scheme(tmp_path):
    """Own ones, too: what the stock tool then reads must not run code either."""
    file = tmp_path / 'epoch_1.pth'
    model = {f'backbone.{k}': v for k, v in HRFormer('tiny').state_dict().items()}
    torch.save(dict(meta={}, state_dict=model), file)
    assert resolve_checkpoint(str(file)) == f'mmhrformer://{file}'
    assert resolve_checkpoint(f'mmhrformer://{file}') == f'mmhrformer://{file}'


def test_others_are_translated(tmp_path):
    file = tmp_path / 'hrt_tiny.pth'
    torch.save(golden.official_checkpoint('pose', 'keys_pose_tiny.json'), file)
    assert resolve_checkpoint(str(file)) == f'mmhrformer://{file}'


@pytest.mark.parametrize('config', ['hrnet-tiny_8xb128_in1k', 'swin-tiny_8xb128_in1k'])
def test_ablations_with_another_backbone_are_left_to_the_stock_tool(config, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr('mmhrformer.cli.launch.stock_tool', lambda scope, tool: tool)
    monkeypatch.setattr('mmhrformer.cli.launch.run_script', lambda tool, args: ran.append(args[1]))
    file = tmp_path / 'epoch_1.pth'
    torch.save(dict(state_dict={'backbone.conv1.weight': torch.ones(1)}), file)
    run_stock_tool('test', [config, str(file)])
    assert ran == [str(file)]
    with pytest.raises(SystemExit, match='not an HRFormer checkpoint'):
        run_stock_tool('test', ['hrformer-tiny_8xb128_in1k', str(file)])


def test_a_config_of_a_package_without_pkg_resources_names_the_fix(site, monkeypatch):
    """As with setuptools 82: mmengine looks for packages by pkg_resources."""
    monkeypatch.delitem(sys.modules, 'pkg_resources', raising=False)
    code = 'raise ModuleNotFoundError("No module named \'pkg_resources\'")'
    (site / 'pkg_resources.py').write_text(code)
    config = site / 'a.py'
    config.write_text("_base_ = ['mmpretrain::_base_/default_runtime.py']")
    with pytest.raises(
        SystemExit, match=r'(?s)^train\.py: .*pkg_resources.* Fix: .*"setuptools<82"'
    ):
        run_stock_tool('train', [str(config)])


def test_addresses_are_left_to_the_stock_tool():
    assert resolve_checkpoint('https://example.com/a.pth') == 'https://example.com/a.pth'


def test_the_tool_is_the_one_in_the_folder_itself(tmp_path, monkeypatch):
    package = tmp_path / 'package'
    spec = SimpleNamespace(origin=str(package / '__init__.py'))
    monkeypatch.setattr('importlib.util.find_spec', lambda name: spec)
    with pytest.raises(FileNotFoundError, match=r'mmpretrain in .*package has no tool train\.py'):
        stock_tool('mmpretrain', 'train')
    for place in ('tools/a/deep/train.py', 'tools/train.py', 'tools/misc/test.py'):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    assert stock_tool('mmpretrain', 'train') == tmp_path / 'tools/train.py'
    assert stock_tool('mmpretrain', 'test') == tmp_path / 'tools/misc/test.py'


@pytest.mark.parametrize(
    ('name', 'content', 'error', 'message'),
    [
        ('a.pth', None, FileNotFoundError, 'neither a file'),
        ('a.pth', b'', ValueError, 'empty'),
        ('a.pth', b'<!DOCTYPE html><html>', ValueError, 'web page'),
        ('a-0123abcd.pth', b'anything', DownloadError, 'is not what its name says'),
    ],
)
def test_what_cannot_be_a_checkpoint_is_refused(name, content, error, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        resolve_checkpoint(str(tmp_path / name))
    with pytest.raises(error, match=message):
        resolve_checkpoint(f'mmhrformer://{tmp_path / name}')


def test_the_tool_ends_with_one_line(tmp_path):
    (tmp_path / 'a.pth').write_text('text')
    with pytest.raises(SystemExit, match=r'^test\.py: .*a\.pth'):
        run_stock_tool('test', ['hrformer-tiny_8xb128_in1k', str(tmp_path / 'a.pth')])


def test_a_checkpoint_behind_options_is_not_passed_on_unread(tmp_path):
    args = ['hrformer-tiny_8xb128_in1k', '--launcher', 'none', str(tmp_path / 'a.pth')]
    with pytest.raises(SystemExit, match="got '--launcher' after CONFIG: put CHECKPOINT there"):
        run_stock_tool('test', args)


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('work_dir=unused', 'data are missing:\ntrain_dataloader.dataset.data_root'),
        pytest.param(
            'fp16.loss_scale=512', 'unused options in the config:\nfp16', marks=pytest.mark.slow
        ),
    ],
)
@needs('mmpretrain')
def test_what_the_config_check_says_is_all(option, message, tmp_path):
    """No traceback, and the exit status of an error."""
    command = [sys.executable, str(ROOT / 'tools/train.py'), 'hrformer-tiny_8xb128_in1k']
    env = dict(ENV, PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [*command, '--cfg-options', option], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f'train.py: {message}' in done.stderr
    assert 'Traceback' not in done.stderr
    assert done.stderr.count(message) == 1


def test_the_rank_may_stand_before_the_config(monkeypatch):
    """At the position where torch.distributed.launch inserts it, for instance with mim."""
    ran = []
    monkeypatch.setattr('mmhrformer.cli.launch.run_script', lambda script, args: ran.append(args))
    run_stock_tool('train', ['--local-rank=0', 'hrformer-tiny_8xb128_in1k', '--amp'])
    ((config, *rest),) = ran
    assert config.endswith('hrformer-tiny_8xb128_in1k.py')
    assert rest == ['--amp', '--local-rank=0']


@pytest.mark.parametrize(
    'name',
    [
        pytest.param('hrformer-tiny_8xb128_in1k', marks=needs('mmpretrain')),
        pytest.param('td-hm_hrformer-tiny_8xb32-210e_coco-256x192', marks=needs('mmpose')),
        pytest.param('ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024', marks=needs('mmseg')),
    ],
)
def test_the_config_is_parsed_once_by_us_and_once_by_the_stock_tool(name, monkeypatch):
    read, parse, ran = [], Config.fromfile, []

    def count(path, *args, **kwargs):
        read.append(Path(path).stem)
        return parse(path, *args, **kwargs)

    monkeypatch.setattr(Config, 'fromfile', count)
    monkeypatch.setattr(
        Runner, 'from_cfg', lambda cfg: SimpleNamespace(train=lambda: ran.append(cfg.filename))
    )
    for variable in ('argv', 'path'):
        monkeypatch.setattr(sys, variable, list(getattr(sys, variable)))
    monkeypatch.setenv('LOCAL_RANK', '0')  # the stock tool sets it
    run_stock_tool('train', [name])
    assert read == [name] * 2
    assert [Path(file).stem for file in ran] == [name]

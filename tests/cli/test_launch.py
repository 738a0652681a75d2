"""What our tools do before a stock tool takes over."""

from __future__ import annotations

import golden
import pytest
import torch

from mmhrformer import HRFormer
from mmhrformer.checkpoints import DownloadError
from mmhrformer.cli.launch import checked, run_stock_tool


def test_checkpoints_are_handed_on_behind_the_scheme(tmp_path):
    """Own ones, too: what the stock tool then reads must not run code either."""
    file = tmp_path / 'epoch_1.pth'
    model = {f'backbone.{k}': v for k, v in HRFormer('tiny').state_dict().items()}
    torch.save(dict(meta={}, state_dict=model), file)
    assert checked(str(file)) == f'mmhrformer://{file}'
    assert checked(f'mmhrformer://{file}') == f'mmhrformer://{file}'


def test_others_are_translated(tmp_path):
    file = tmp_path / 'hrt_tiny.pth'
    torch.save(golden.official_checkpoint('pose', 'keys_pose_tiny.json'), file)
    assert checked(str(file)) == f'mmhrformer://{file}'


def test_addresses_are_left_to_the_stock_tool():
    assert checked('https://example.com/a.pth') == 'https://example.com/a.pth'


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
        checked(str(tmp_path / name))


def test_the_tool_ends_with_one_line(tmp_path):
    (tmp_path / 'a.pth').write_text('text')
    with pytest.raises(SystemExit, match=r'^test\.py: .*a\.pth'):
        run_stock_tool('test', ['hrformer-tiny_8xb128_in1k', str(tmp_path / 'a.pth')])


def test_the_rank_may_stand_before_the_config(monkeypatch):
    """Where torch.distributed.launch puts it, for instance for mim."""
    ran = []
    monkeypatch.setattr('mmhrformer.cli.launch.run_script', lambda script, args: ran.append(args))
    run_stock_tool('train', ['--local-rank=0', 'hrformer-tiny_8xb128_in1k', '--amp'])
    ((config, *rest),) = ran
    assert config.endswith('hrformer-tiny_8xb128_in1k.py')
    assert rest == ['--amp', '--local-rank=0']

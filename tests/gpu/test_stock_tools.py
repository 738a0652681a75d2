"""The stock training tools with the shipped configs on a GPU: half precision, killed, resumed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from needs import needs
from small_runs import pointed
from tiny_datasets import make

from mmhrformer.cli.launch import stock_tool
from mmhrformer.configs import find_config

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
TIMEOUT = 150  # seconds until the first checkpoint
OPTIONS = {
    'mmpretrain': [],
    'mmpose': ['model.backbone.init_cfg=None'],
    'mmseg': ['model.backbone.init_cfg=None', 'model.decode_head.1.loss_decode.min_kept=1000'],
}
RUNS = {
    'mmpretrain': ('imagenet', 'hrformer-small_8xb128_in1k'),
    'mmpose': ('coco', 'td-hm_hrformer-base_8xb32-210e_coco-256x192'),
    'mmseg': ('cityscapes', 'ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024'),
}


class Run:
    """A training by torchrun and a framework's own tool, in a folder with its data."""

    def __init__(self, scope: str, dtype: str, folder: Path, device: torch.device) -> None:
        self.scope, self.folder, self.work = scope, folder, folder / 'work'
        data, config = RUNS[scope]
        make(data, folder / 'data')
        tool = stock_tool(scope, 'train')
        half = [f'optim_wrapper.dtype={dtype}']
        if device.type == 'cpu':  # the stock tools train by processes on GPUs only
            tool = ROOT / 'tools/train.py'
            half = ['optim_wrapper.type=OptimWrapper', 'env_cfg.dist_cfg.backend=gloo']
            half += ['model_wrapper_cfg.type=mmhrformer.CPUDistributedDataParallel']
        self.by_epoch = scope != 'mmseg'
        self.command = [
            *(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1'),
            *(str(tool), str(find_config(config)), '--launcher=pytorch', f'--work-dir={self.work}'),
        ]  # fmt: skip
        self.options = [
            *half, *OPTIONS[scope], 'train_dataloader.batch_size=2',
            'train_dataloader.num_workers=1', 'val_dataloader.num_workers=1',
            'default_hooks.checkpoint.interval=1', 'default_hooks.logger.interval=1',
        ]  # fmt: skip

    def start(self, length: int, *more: str) -> subprocess.Popen:
        """Train up to an epoch, or an iteration of segmentation, and validate once there."""
        kind = 'epochs' if self.by_epoch else 'iters'
        command = [*self.command, *more, '--cfg-options', *self.options]
        command += [f'train_cfg.max_{kind}={length}', f'train_cfg.val_interval={length}']
        path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
        env = dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
        with (self.folder / 'said').open('w') as out:
            return subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=out, stderr=out, start_new_session=True
            )

    def said(self) -> str:
        return (self.folder / 'said').read_text()

    def kill_at_first_checkpoint(self) -> int:
        """Start it, kill it, and return the epoch or iteration of its last checkpoint."""
        process, deadline = self.start(1000), time.monotonic() + TIMEOUT
        while not (self.work / 'last_checkpoint').exists():
            assert process.poll() is None, self.said()[-5000:]
            assert time.monotonic() < deadline, self.said()[-5000:]
            time.sleep(0.05)
        for each in Path('/proc').glob('[0-9]*'):  # torchrun starts a session for each process
            with contextlib.suppress(OSError):  # it may have ended
                if str(self.work) in (each / 'cmdline').read_text():
                    os.kill(int(each.name), signal.SIGKILL)
        process.wait()
        return int(Path(pointed(self.work)).stem.split('_')[1])

    def scalars(self) -> list[dict]:
        """The records of the newest log, one line of JSON each."""
        newest = max(self.work.glob('*/vis_data/scalars.json'))
        return [json.loads(line) for line in newest.read_text().splitlines()]


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('scope', [pytest.param(scope, marks=needs(scope)) for scope in RUNS])
def test_stock_tools_train_and_resume(scope, dtype, tmp_path, device, on_cuda):
    run = Run(scope, dtype, tmp_path, device)
    at = run.kill_at_first_checkpoint()
    process = run.start(at + 2, '--resume')
    assert process.wait(TIMEOUT) == 0, run.said()[-5000:]
    unit = 'epoch' if run.by_epoch else 'iter'
    assert f'resumed epoch: {at}' in run.said() or f'iter: {at}' in run.said()
    logged = [line for line in run.scalars() if 'loss' in line]
    assert all(math.isfinite(line['loss']) for line in logged)
    assert {line[unit] for line in logged} == {at + 1, at + 2}
    saved = torch.load(run.work / pointed(run.work), map_location='cpu', weights_only=False)
    assert saved['meta'][unit] == at + 2
    assert all(x.isfinite().all() for x in saved['state_dict'].values())
    assert ('loss_scaler' in saved['optimizer']) == on_cuda

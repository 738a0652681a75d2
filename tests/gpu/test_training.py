"""Training on GPUs: half precision, mmengine's runner, several processes."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.utils import digit_version
from needs import may_need
from small_runs import Reading, amp, pointed, train
from training_steps import prepare

from mmhrformer.configs import find_config
from mmhrformer.engine import BFloat16PoseHook

pytestmark = [pytest.mark.gpu, may_need('mmpretrain', 'mmpose', 'mmseg')]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DTYPES = ['float16', 'bfloat16']
DEMOS = {
    'cls': 'hrformer-demo_1xb64-6e_digits',
    'pose': 'td-hm_hrformer-demo_1xb16-2e_figures-96x128',
    'seg': 'ocrnet_hrformer-demo_1xb16-100_scenes-96x96',
}


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('task', DEMOS)
def test_200_steps_in_half_precision(task, dtype, device, on_cuda):
    """The models of the demos learn one batch by heart."""
    torch.manual_seed(0)
    _, model, _, batch = prepare(Config.fromfile(find_config(DEMOS[task])))
    model = model.to(device).train()
    optimizer = build_optim_wrapper(model, amp(dtype, on_cuda))
    if task == 'pose':
        options = dict(model=model, optim_wrapper=optimizer, logger=logging.getLogger())
        BFloat16PoseHook().before_train(SimpleNamespace(**options))
    losses = []
    for _ in range(200):
        losses.append(model.train_step(batch, optimizer)['loss'].detach())
    losses = torch.stack(losses).tolist()
    print(f'{task} {dtype}: loss {losses[0]:.4f} to {losses[-1]:.4f}')
    assert all(map(math.isfinite, losses))
    # The pixels of seg have labels by chance: nothing but the prior can be learned there soon.
    assert sum(losses[-20:]) < (0.95 if task == 'seg' else 0.5) * sum(losses[:20])
    assert all(p.isfinite().all() for p in model.parameters())
    if on_cuda and dtype == 'float16':
        assert optimizer.loss_scaler.get_scale() >= 1


def contents(work: Path) -> dict:
    return torch.load(work / pointed(work), map_location='cpu', weights_only=False)


def leaves(tree) -> list:
    """Everything in nested dicts and lists, in order."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [leaf for key, value in items for leaf in (key, *leaves(value))]
    return [tree]


def same(ours, theirs) -> bool:
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_killed_run_resumes_with_the_same_bits(dtype, tmp_path, on_cuda):
    """With two batches per step, averaged weights, and loss scaling in float16."""

    def run(folder: str, *stop: int, **more) -> dict[int, float]:
        options = dict(
            model=Reading(),
            optim_wrapper=amp(dtype, on_cuda, accumulative_counts=2, clip_grad=dict(max_norm=1.0)),
            custom_hooks=[dict(type='EMAHook', momentum=0.1)],
            randomness=dict(seed=3, deterministic=True),
        )
        return train(tmp_path / folder, *stop, **options, **more)

    whole = run('whole')
    assert all(map(math.isfinite, whole.values()))
    run('cut', 9)
    resumed = run('cut', resume=True)
    assert resumed == {step: whole[step] for step in range(8, 16)}
    cut, left_alone = contents(tmp_path / 'cut'), contents(tmp_path / 'whole')
    for part in ('state_dict', 'ema_state_dict', 'optimizer'):
        pairs = zip(leaves(cut[part]), leaves(left_alone[part]), strict=True)
        assert all(same(ours, theirs) for ours, theirs in pairs), part
    assert ('loss_scaler' in cut['optimizer']) == on_cuda


# ---------------------------------------------------------------- several processes

PROCESSES = sorted({1, max(1, torch.cuda.device_count())})


def torchrun(processes: int, case: str, folder: Path, device: torch.device) -> str:
    """Run a case of worker.py in some processes; their output."""
    options = ['--standalone', '--nproc_per_node', str(processes), str(HERE / 'worker.py')]
    path = os.pathsep.join([str(HERE.parent), str(ROOT), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', *options, case, str(folder), device.type],
        env=dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore'),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.mark.parametrize('processes', PROCESSES)
def test_processes_train_as_one(processes, tmp_path, device):
    """With NCCL and synchronized normalization; then mmengine's runner, killed and resumed."""
    said = torchrun(processes, 'ddp', tmp_path, device)
    assert said.count('gradients are those of one process') == processes
    assert said.count('resumed as if left alone') == processes


@pytest.mark.parametrize('processes', PROCESSES)
def test_sharded_training(processes, tmp_path, device, on_cuda):
    """FSDP by mmengine's FlexibleRunner, which stock tools build for runner_type=FlexibleRunner."""
    if not on_cuda and digit_version(torch.__version__) < digit_version('2.5'):
        pytest.skip('FSDP of this torch wants GPUs')
    said = torchrun(processes, 'fsdp', tmp_path, device)
    assert said.count('trained sharded') == processes

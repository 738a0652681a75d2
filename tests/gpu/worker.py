"""One process of a training on GPUs, with ``tests`` on the path.

PYTHONPATH=tests:. torchrun tests/gpu/worker.py ddp|fsdp FOLDER cuda
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.dist import init_dist
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.runner import FlexibleRunner
from small_runs import MICRO, Reading, amp, train
from torch import nn

from mmhrformer import HRFormer
from mmhrformer.engine.cpu_ddp import CPUDistributedDataParallel, prepare_cpu_launch

RANK, WORLD = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
CASE, FOLDER, ON_CUDA = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == 'cuda'
OPTIONS = dict(
    launcher='pytorch',
    env_cfg=dict(dist_cfg=dict(backend='nccl' if ON_CUDA else 'gloo')),
    randomness=dict(seed=3, deterministic=True),
)
if not ON_CUDA:
    OPTIONS['cfg'] = dict(model_wrapper_cfg=dict(type='mmhrformer.CPUDistributedDataParallel'))


def gradients(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    sum(out.square().mean() for out in model(images)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def compare_gradients() -> None:
    """Those of all processes, each with two images, and those of one with all images."""
    init_dist('pytorch', OPTIONS['env_cfg']['dist_cfg']['backend'])
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    images = torch.randn(WORLD, 2, 3, 64, 64)
    model = HRFormer(arch=MICRO, norm_cfg=dict(type='SyncBN'))
    alone = revert_sync_batchnorm(copy.deepcopy(model))
    if ON_CUDA:
        images, model, alone = images.cuda(), model.cuda(), alone.cuda()
        wrapped = MMDistributedDataParallel(model, device_ids=[torch.cuda.current_device()])
    else:
        wrapped = CPUDistributedDataParallel(model)
    got, want = gradients(wrapped, images[RANK]), gradients(alone, images.flatten(0, 1))
    error = sum((a - b).square().sum() for a, b in zip(got, want, strict=True)).sqrt()
    error = (error / sum(b.square().sum() for b in want).sqrt()).item()
    assert error < 1e-3, error
    print(f'{RANK}: gradients are those of one process, but for {error:.0e}', flush=True)


def check_resuming(make_model: Callable, **options) -> None:
    """A run that is stopped and resumed goes on as one that was left alone."""

    def run(folder: str, stop: int | None = None, **more) -> dict[int, float]:
        return train(FOLDER / folder, stop, model=make_model(), **options, **OPTIONS, **more)

    whole = run('whole')
    assert all(map(math.isfinite, whole.values())), whole
    run('cut', len(whole) // 2 + 1)
    resumed = run('cut', resume=True)
    assert 0 < len(resumed) < len(whole)
    assert resumed == {step: whole[step] for step in resumed}
    print(f'{RANK}: resumed as if left alone', flush=True)


def shard() -> None:
    """The other runner of mmengine, with sharded weights; its files hold the whole ones.

    It cannot resume: mmengine 0.10.7 hands FSDP the state of the optimizer in the order that torch
    2.0 had.
    """
    wrapper = amp('bfloat16', ON_CUDA, **(dict(use_fsdp=True) if ON_CUDA else {}))
    model_wrapper = dict(type='MMFullyShardedDataParallel', use_orig_params=True)
    if not ON_CUDA:
        model_wrapper['device_id'] = torch.device('cpu')
    strategy = dict(type='FSDPStrategy', state_dict_cfg='full', model_wrapper=model_wrapper)
    options = dict(kind=FlexibleRunner, strategy=strategy, optim_wrapper=wrapper, **OPTIONS)
    found = train(FOLDER, model=Reading(), hook=dict(save_optimizer=False), **options)
    assert all(map(math.isfinite, found.values())), found
    if RANK == 0:
        saved = torch.load(FOLDER / 'epoch_4.pth', map_location='cpu', weights_only=False)
        Reading().load_state_dict(saved['state_dict'])
    print(f'{RANK}: trained sharded', flush=True)


if __name__ == '__main__':
    prepare_cpu_launch(['--launcher', 'pytorch'])
    if CASE == 'ddp':
        compare_gradients()
        wrapper = amp('float16', ON_CUDA)
        check_resuming(lambda: Reading('SyncBN'), optim_wrapper=wrapper)
    else:
        shard()
    torch.distributed.destroy_process_group()

"""Several processes on CPUs: the launch, the wrapper, and gradients as those of one process."""

from __future__ import annotations

import copy
import datetime
import os
import socket
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.dist import init_dist
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, nn

from mmhrformer import HRFormer
from mmhrformer.engine import cpu_ddp
from mmhrformer.engine.cpu_ddp import CPUDistributedDataParallel, prepare_cpu_launch

MICRO = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
GROUP_NORM = dict(type='GN', num_groups=4)
LAUNCHED = dict(RANK='1', LOCAL_RANK='1', WORLD_SIZE='2')
# Name of a case -> options of the model, options of the wrapper. The statistics of half a batch are
# not those of the whole one, so none normalizes by them.
CASES = {
    'finest stream': (dict(out_indices=(0,), norm_eval=True), {}),
    'all streams': (dict(norm_eval=True), {}),
    'finest stream, recomputed': (dict(out_indices=(0,), norm_eval=True, with_cp=True), {}),
    'all streams, recomputed': (dict(norm_eval=True, with_cp=True), {}),
    'group norm': (dict(norm_cfg=GROUP_NORM), {}),
    'static graph': (dict(out_indices=(0,), norm_eval=True), dict(static_graph=True)),
    'bucket views': (dict(norm_eval=True), dict(gradient_as_bucket_view=True)),
    'both, recomputed': (
        dict(out_indices=(0,), norm_eval=True, with_cp=True),
        dict(static_graph=True, gradient_as_bucket_view=True),
    ),
}


def make_model(options: dict) -> HRFormer:
    """A model as training starts with it, the same in every process."""
    torch.manual_seed(0)
    return HRFormer(MICRO, **options).train()


def images() -> Tensor:
    return golden.image((4, 3, 40, 56))  # incomplete windows, odd streams


def step(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Gradients of the mean of the squares of all streams, in the second step.

    After the first one buckets are rebuilt and a static graph is known. The weights stay: rounding
    errors would otherwise be carried on and amplified.
    """
    for batch in (x.flip(-1), x):
        model.zero_grad()
        sum(stream.square().mean() for stream in model(batch)).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def all_cases(rank: int, world_size: int, folder: str) -> None:
    """Work of each process: run its part of the batch through every case."""
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        f'file://{folder}/rendezvous',
        datetime.timedelta(seconds=60),
        world_size=world_size,
        rank=rank,
    )
    part = images().chunk(world_size)[rank]
    results = {}
    for case, (options, wrapping) in CASES.items():
        results[case] = step(CPUDistributedDataParallel(make_model(options), **wrapping), part)
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def gradients(tmp_path_factory) -> list[dict[str, list[Tensor | None]]]:
    """Results of every case, in each of two processes."""
    folder = tmp_path_factory.mktemp('processes')
    paths = os.pathsep.join([str(Path(golden.__file__).parent), os.environ.get('PYTHONPATH', '')])
    env = dict(os.environ, PYTHONPATH=paths, GLOO_SOCKET_IFNAME='lo')
    # Not forked from this process, where other tests may have started threads.
    subprocess.run([sys.executable, __file__, str(folder)], env=env, check=True, timeout=300)
    return [torch.load(folder / f'{rank}.pt') for rank in range(2)]


@pytest.mark.once
@pytest.mark.parametrize('case', CASES)
def test_gradients_are_those_of_one_process(gradients, case):
    expected = step(make_model(CASES[case][0]), images())
    assert all(gradient is not None for gradient in expected)
    scale = torch.cat([gradient.flatten() for gradient in expected]).norm()
    for of_process in gradients:
        assert all(gradient is not None for gradient in of_process[case])
        error = [(one - other).flatten() for one, other in zip(of_process[case], expected)]
        assert torch.cat(error).norm() < 1e-5 * scale
    for one, other in zip(gradients[0][case], gradients[1][case]):
        assert torch.equal(one, other)


@pytest.fixture
def launched(monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu_ddp, 'get_device', lambda: 'cpu')
    return monkeypatch


@pytest.mark.parametrize(
    'args', [['c.py', '--launcher', 'pytorch'], ['c.py', '--launcher=pytorch', '--resume']]
)
def test_a_launch_on_cpus_asks_for_no_device(launched, args):
    assert prepare_cpu_launch(args)
    assert os.environ['LOCAL_RANK'] == '-1'
    torch.cuda.set_device(int(os.environ['LOCAL_RANK']))  # what mmengine does next
    assert not prepare_cpu_launch(args)
    assert os.environ['RANK'] == '1'


@pytest.mark.parametrize('args', [[], ['--launcher', 'none'], ['pytorch'], ['--launcher']])
def test_nothing_happens_without_the_launcher(launched, args):
    assert not prepare_cpu_launch(args)
    assert os.environ['LOCAL_RANK'] == '1'


@pytest.mark.parametrize('name', LAUNCHED)
def test_nothing_happens_to_a_single_process(launched, name):
    launched.delenv(name)
    assert not prepare_cpu_launch(['--launcher', 'pytorch'])
    assert os.environ.get('LOCAL_RANK') in (None, '1')


@pytest.mark.parametrize('device', ['cuda', 'npu', 'mps'])
def test_nothing_happens_where_there_is_an_accelerator(launched, device):
    launched.setattr(cpu_ddp, 'get_device', lambda: device)
    assert not prepare_cpu_launch(['--launcher', 'pytorch'])
    assert os.environ['LOCAL_RANK'] == '1'


def test_the_first_process_says_what_else_is_needed(launched, capsys):
    launched.setenv('RANK', '0')
    assert prepare_cpu_launch(['--launcher', 'pytorch'])
    said = capsys.readouterr().out
    assert 'env_cfg.dist_cfg.backend=gloo' in said
    assert 'model_wrapper_cfg.type=mmhrformer.CPUDistributedDataParallel' in said


@pytest.fixture
def port() -> str:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def alone(launched, port):
    """The first of processes on this machine, launched."""
    launched.setenv('RANK', '0')
    launched.setenv('MASTER_ADDR', '127.0.0.1')
    launched.setenv('MASTER_PORT', port)
    launched.setenv('GLOO_SOCKET_IFNAME', 'lo')
    assert prepare_cpu_launch(['--launcher', 'pytorch'])
    yield launched
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_process_that_never_comes(alone):
    """mmengine waits for it as long as ``env_cfg.dist_cfg`` says, not for ever."""
    with pytest.raises(RuntimeError, match=r'(?i)timed? ?out'):
        init_dist('pytorch', backend='gloo', timeout=1)
    assert not dist.is_initialized()


def test_mmengine_builds_the_wrapper(alone):
    """With the device that mmengine passes, and synchronized normalization in the model."""
    alone.setenv('WORLD_SIZE', '1')
    init_dist('pytorch', backend='gloo', timeout=60)
    assert dist.get_backend() == 'gloo'
    model = HRFormer(MICRO, norm_cfg=dict(type='SyncBN'))
    plain = HRFormer(MICRO)
    plain.load_state_dict(model.state_dict())
    parameters = list(model.parameters())
    wrapped = MODEL_WRAPPERS.build(
        dict(type='mmhrformer.CPUDistributedDataParallel'),
        default_args=dict(module=model, device_ids=[int(os.environ['LOCAL_RANK'])]),
    )
    assert not wrapped.broadcast_buffers
    assert not wrapped.find_unused_parameters
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in wrapped.modules())
    assert all(one is other for one, other in zip(wrapped.parameters(), parameters))
    for one, other in zip(wrapped.train()(images()), plain.train()(images())):
        torch.testing.assert_close(one, other)


def test_a_model_elsewhere_is_refused(alone):
    model = copy.deepcopy(HRFormer(MICRO)).to('meta')
    with pytest.raises(
        ValueError, match=r"module: .*\['meta'\].* do not set model_wrapper_cfg.type"
    ):
        CPUDistributedDataParallel(model)


if __name__ == '__main__':
    mp.start_processes(all_cases, args=(2, sys.argv[1]), nprocs=2, start_method='fork')

"""Batch normalization with GELU in Triton."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from triton_on_cpu import DEVICE, REASON, plan_anew

if REASON:
    pytest.skip(REASON, allow_module_level=True)

from mmhrformer.ops import triton_norm

TESTS = Path(__file__).parents[1]
DTYPES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
SIZES = [(2, 8, 6, 5), (2, 78, 7, 4), (1, 312, 5, 3), (3, 33, 7, 5), (2, 1, 3, 2), (1, 128, 9, 16)]
NAMES = ('output', 'running mean', 'running var', 'gradient', 'of weight', 'of bias')


def make(
    size: tuple[int, ...], dtype: torch.dtype = torch.float32, mean: float = 0.0
) -> dict[str, Tensor]:
    """A map, its gradient, and what belongs to its channels."""
    generator = torch.Generator().manual_seed(sum(size))
    C = size[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    tensors = dict(
        x=(normal(*size) + mean).to(dtype).contiguous(memory_format=torch.channels_last),
        weight=normal(C) + 1,
        bias=normal(C),
        running_mean=normal(C),
        running_var=normal(C).square() + 0.5,
        grad=normal(*size).to(dtype),
    )
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def run(function, tensors: dict[str, Tensor], dtype=None, **options) -> list[Tensor]:
    """Output, running statistics and gradients, in the order of :data:`NAMES`."""
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    leaves = [tensors[name].detach().requires_grad_() for name in ('x', 'weight', 'bias')]
    running = [tensors[name].clone() for name in ('running_mean', 'running_var')]
    out = function(*leaves, *running, **options)
    return [out.detach(), *running, *torch.autograd.grad(out, leaves, tensors['grad'])]


def plain(x, weight, bias, mean, var, momentum=0.1, eps=1e-5, training=True) -> Tensor:
    return F.gelu(F.batch_norm(x, mean, var, weight, bias, training, momentum, eps))


def fused(
    x, weight, bias, mean, var, momentum=0.1, eps=1e-5, training=True, process_group=None
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    statistics = (mean, mean, var)
    if training:
        statistics = triton_norm.batch_statistics(x.detach(), mean, var, momentum, process_group)
    return triton_norm.normalize_gelu(x, weight, bias, statistics, eps, training, process_group)


def errors(ours: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Relative errors."""
    norms = [(a.double() - b).norm() / b.norm().clamp(min=1e-3) for a, b in zip(ours, exact)]
    return {name: norm.item() for name, norm in zip(NAMES, norms)}


def check(tensors: dict[str, Tensor], bound: float, **options) -> None:
    ours = run(fused, tensors, **options)
    assert ours[0].dtype == ours[3].dtype == tensors['x'].dtype
    assert all(tensor.dtype == torch.float32 for tensor in (*ours[1:3], *ours[4:]))
    found = errors(ours, run(plain, tensors, torch.float64, **options))
    assert max(found.values()) < bound, found


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', SIZES)
def test_as_torch_in_float64(size, dtype):
    check(make(size, dtype), DTYPES[dtype])


@pytest.mark.parametrize('options', [dict(training=False), dict(momentum=0.7)])
def test_options(options):
    check(make((2, 24, 5, 3)), 1e-5, **options)


def test_contiguous_map():
    tensors = make((2, 24, 5, 3))
    tensors['x'] = tensors['x'].contiguous()
    check(tensors, 1e-5)


@pytest.fixture
def small(monkeypatch):
    """Tiles so small, and programs so few, that all loops run several times."""
    launch = dict.fromkeys(triton_norm.LAUNCH, (256, 6, 1))
    monkeypatch.setattr(triton_norm, 'LAUNCH', launch)
    monkeypatch.setattr(triton_norm, 'COMBINE', (2, 16, 1))
    plan_anew(monkeypatch, triton_norm)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('channels', [20, 36])
def test_many_tiles(small, channels, training):
    check(make((3, channels, 10, 11)), 1e-5, training=training)


def test_large_means(small):
    tensors = make((2, 32, 12, 10), mean=1000.0)
    exact = run(plain, tensors, torch.float64)
    ours, theirs = errors(run(fused, tensors), exact), errors(run(plain, tensors), exact)
    for name in NAMES:
        assert ours[name] < max(theirs[name], 2e-5), (name, ours, theirs)


def test_constant_channels():
    tensors = make((2, 32, 6, 5))
    tensors['x'][:] = 0.1
    out, _, var, grad, of_weight, _ = run(fused, tensors)
    expected = F.gelu(tensors['bias'])[:, None, None].expand_as(out)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(var, 0.9 * tensors['running_var'])
    assert torch.isfinite(grad).all()
    assert torch.isfinite(of_weight).all()


def test_not_a_number_is_not_hidden():
    tensors = make((2, 32, 6, 5))
    tensors['x'][0, 3, 2, 1] = float('nan')
    ours = run(fused, tensors)
    for tensor, theirs in zip(ours, run(plain, tensors)):
        assert torch.equal(tensor.isnan(), theirs.isnan())


def test_same_bits_each_time(small):
    tensors = make((3, 20, 10, 11), torch.float16)
    for one, other in zip(run(fused, tensors), run(fused, tensors)):
        assert torch.equal(one, other)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', ['x', 'weight', 'bias'])
def test_single_gradients(name, training):
    tensors = make((2, 24, 5, 3))
    grads = []
    for function in (fused, plain):
        args = {n: tensors[n].clone().requires_grad_(n == name) for n in ('x', 'weight', 'bias')}
        running = tensors['running_mean'], tensors['running_var']
        out = function(*args.values(), *running, training=training)
        grads.append(*torch.autograd.grad(out, args[name], tensors['grad']))
    torch.testing.assert_close(*grads)


def test_without_running_statistics():
    tensors = make((2, 24, 5, 3))
    x, weight, bias = (tensors[name] for name in ('x', 'weight', 'bias'))
    out = fused(x, weight, bias, None, None)
    torch.testing.assert_close(out, plain(x, weight, bias, None, None))


def test_only_the_input_is_kept():
    tensors = make((2, 24, 5, 3))
    x = tensors['x'].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        fused(x, *(tensors[n] for n in ('weight', 'bias', 'running_mean', 'running_var')))
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() > 24] == [x.data_ptr()]


def test_one_value_per_channel_has_no_variance():
    tensors = make((1, 24, 1, 1))
    del tensors['grad']
    with pytest.raises(ValueError, match=r'\(1, 24, 1, 1\) has only one value per channel'):
        fused(*tensors.values())


def test_one_value_per_channel_is_enough_for_running_statistics():
    check(make((1, 24, 1, 1)), 1e-5, training=False)


def test_second_derivatives_are_refused():
    tensors = make((2, 24, 5, 3))
    x = tensors['x'].requires_grad_()
    names = ('weight', 'bias', 'running_mean', 'running_var')
    out = fused(x, *(tensors[name] for name in names))
    with pytest.raises(RuntimeError, match=r"no second derivatives.*ops\.use\('reference'\)"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_operators_know_shapes_and_what_they_change():
    tensors = make((2, 24, 5, 3))
    x, weight, bias, mean, var, grad = tensors.values()
    grad = grad.contiguous(memory_format=torch.channels_last)
    moments = triton_norm.moments(x, None, None, None, 0.1)
    statistics = (*moments.unbind(), weight, bias)
    options = (1e-5, True)
    tracked = torch.zeros((), dtype=torch.int64, device=DEVICE)
    sums, *_ = triton_norm.gradient_sums(grad, x, *statistics, *options, False)
    ops = torch.ops.mmhrformer
    for operator, args in (
        (ops.batch_norm_moments, (x, mean, var, tracked, 0.1)),
        (ops.batch_norm_normalize, (x, *statistics, *options)),
        (ops.batch_norm_gradient_sums, (grad, x, *statistics, *options, False)),
        (ops.batch_norm_gradient_sums, (grad, x, *statistics, *options, True)),
        (ops.batch_norm_input_gradient, (grad, x, *statistics, sums, *options)),
    ):
        torch.library.opcheck(operator, args)


# How many images of (5, 4, 3) each of two processes has.
SPLITS = [(3, 1), (2, 2), (0, 4)]


def one_process(rank: int, folder: str) -> None:
    """Results of each process for its part of the images."""
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group('gloo', f'file://{folder}/meet', wait, world_size=2, rank=rank)
    results = []
    for split in SPLITS:
        tensors = make((4, 5, 4, 3))
        for name in ('x', 'grad'):
            tensors[name] = tensors[name].split(split)[rank]
        results.append(run(fused, tensors, process_group=dist.group.WORLD))
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE != 'cpu', reason='two processes need two GPUs')
def test_shared_statistics(tmp_path):
    # Not forked from this process, where other tests may have started threads.
    env = dict(os.environ, GLOO_SOCKET_IFNAME='lo', PYTHONPATH=str(TESTS), TRITON_INTERPRET='0')
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=env, check=True, timeout=120)
    parts = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    exact = run(plain, make((4, 5, 4, 3)), torch.float64)
    for one, other in zip(*parts):
        ours = [torch.cat([one[0], other[0]]), *one[1:3], torch.cat([one[3], other[3]])]
        ours += [one[4] + other[4], one[5] + other[5]]
        assert max(errors(ours, exact).values()) < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(one[1:3], other[1:3]))


if __name__ == '__main__':
    mp.start_processes(one_process, args=(sys.argv[1],), nprocs=2, start_method='fork')

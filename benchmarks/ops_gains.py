"""Gain of each optimization of the operators: whole models with and without it, interleaved.

  OMP_NUM_THREADS=1 python benchmarks/ops_gains.py [--cases 'S, 256x192, batch 1, folded']

Prints a table of CPU time (least affected by a busy machine) without an optimization, relative to
that with all: the median, the smallest and the largest ratio over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from mmhrformer import HRFormer, fuse_for_inference, ops
from mmhrformer.ops import compiled, cpu, recompute, reference

# A name in mmhrformer.ops.cpu, and its value without the optimization.
OPTIMIZATIONS = {
    'SDPA in inference': ('HAS_MASKED_SDPA', False),
    'softmax written out': ('window_attention', compiled.window_attention),
    'zeros appended to heads': ('head_padding', reference.head_padding),
    'contiguous depth-wise backward': ('depthwise_conv', reference.depthwise_conv),
    'oneDNN GELU': ('conv_gelu', reference.conv_gelu),
    'GELU in place': ('norm_gelu_conv', recompute.norm_gelu_conv),
    'recomputation': ('norm_gelu_conv', reference.norm_gelu_conv),
}
CASES = {  # arch, height, width, batch, how
    f'{case[0][0].upper()}, {case[1]}x{case[2]}, batch {case[3]}, {case[4]}': case
    for case in [
        ('small', 256, 192, 1, 'unfolded'),
        ('small', 256, 192, 1, 'folded'),
        ('base', 256, 192, 1, 'unfolded'),
        ('base', 256, 192, 1, 'folded'),
        ('small', 256, 192, 8, 'training'),
        ('small', 512, 1024, 1, 'folded'),
        ('small', 256, 192, 8, 'unfolded'),
        ('small', 256, 192, 8, 'folded'),
        ('base', 256, 192, 2, 'training'),
        ('base', 256, 192, 8, 'folded'),
        ('small', 512, 1024, 1, 'unfolded'),
    ]
}


def optimizations_of(arch: str, how: str) -> list[str]:
    """The optimizations that this torch has and that are relevant to a case."""
    if arch == 'base':
        return ['zeros appended to heads']
    if how == 'training':
        slow = ['contiguous depth-wise backward'] * cpu.DEPTHWISE_BACKWARD_IS_CONTIGUOUS
        return ['softmax written out', *slow, 'recomputation']
    attention = 'SDPA in inference' if cpu.HAS_MASKED_SDPA else 'softmax written out'
    if how == 'folded':
        return [attention, *['oneDNN GELU'] * (cpu.ONEDNN_CONVOLUTION is not None)]
    return [attention, 'GELU in place']


@contextmanager
def without(name: str | None):
    """Use the backend for CPUs, without one of its optimizations."""
    with ExitStack() as stack:
        stack.enter_context(ops.use('cpu'))
        if name is not None:
            stack.enter_context(mock.patch.object(cpu, *OPTIMIZATIONS[name]))
        yield


def measure(case: tuple, rounds: int) -> dict[str, list[float]]:
    """CPU time without each optimization, relative to that with all, by round."""
    arch, height, width, batch, how = case
    names = optimizations_of(arch, how)
    torch.manual_seed(0)
    model = HRFormer(arch, upsample='bilinear', out_indices=(0,))
    model = model.train(how == 'training').to(memory_format=torch.channels_last)
    x = torch.rand(batch, 3, height, width).to(memory_format=torch.channels_last)
    models = dict.fromkeys([None, *names], model)
    if how == 'folded':
        for name in models:
            with without(name):  # head padding is done by folding
                fused = fuse_for_inference(model)
            models[name] = fused.to(memory_format=torch.channels_last)

    def run(name: str | None) -> float:
        start = time.process_time()
        with without(name), torch.set_grad_enabled(how == 'training'):
            out = models[name](x)[0]
            if how == 'training':
                out.square().mean().backward()
        return time.process_time() - start

    ratios = {name: [] for name in names}
    for index in range(rounds + 1):  # the first one warms up
        model.zero_grad()
        order = list(models) if index % 2 else list(models)[::-1]
        times = {name: run(name) for name in order}
        for name in names if index else ():
            ratios[name].append(times[name] / times[None])
    return ratios


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES), metavar='CASE')
    parser.add_argument('--rounds', type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f'| torch {torch.__version__} | without | time | smallest | largest |', flush=True)
    print('| :-- | :-- | --: | --: | --: |')
    for case in args.cases:
        for name, ratios in measure(CASES[case], args.rounds).items():
            figures = [f'{f(ratios):.2f}' for f in (statistics.median, min, max)]
            print('|', ' | '.join([case, name, *figures]), '|', flush=True)


if __name__ == '__main__':
    main()

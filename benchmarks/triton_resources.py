"""Registers, spills and load widths of the Triton kernels, compiled without a GPU."""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmhrformer.ops import triton_attention as attention
from mmhrformer.ops import triton_conv as conv
from mmhrformer.ops import triton_exchange as exchange
from mmhrformer.ops import triton_layer_norm as layer_norm
from mmhrformer.ops import triton_linear as linear
from mmhrformer.ops import triton_norm as batch_norm
from mmhrformer.ops import triton_sums as sums
from mmhrformer.ops.triton_launch import Launch

TOOL = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
# Heads, head dim and window of HRFormer-T, -S and -B, whose 18 and 39 channels the models pad to
# multiples of 8; windows of 13 and 15 are those of segmentation.
ATTENTION = [(1, 24, 7), (1, 32, 7), (8, 32, 7), (2, 40, 7), (16, 40, 7)]
ATTENTION += [(2, 32, 15), (2, 40, 13), (2, 40, 15), (16, 40, 15)]
ATTENTION += [(1, 18, 7), (2, 39, 7), (2, 39, 13), (2, 39, 15)]  # without padding
# Maps of 64 images: height, width, channels. In FFNs, and of the streams.
HIDDEN = [(64, 48, 128), (64, 48, 312), (16, 12, 512)]
STREAMS = [(64, 48, 32), (32, 24, 64), (64, 48, 78)]
# Inputs and outputs of folded linear layers, and whether they normalize their input.
LINEAR = [(32, 96, True), (32, 128, True), (128, 32, False), (78, 312, True), (312, 78, False)]
# The same with 78 and 156 channels padded, as fuse_for_inference can.
LINEAR += [(80, 240, True), (80, 80, False), (80, 312, True), (312, 80, False)]
LINEAR += [(160, 480, True), (160, 160, False), (160, 624, True), (624, 160, False)]
CHANNELS = {80: 78, 160: 156}
# Maps of 64 images to which streams are added, and the factors by which these are enlarged.
EXCHANGES = [((64, 48, 32), (2, 4, 8)), ((64, 48, 78), (2, 4, 8)), ((64, 48, 80), (2, 4, 8))]
EXCHANGES += [((32, 24, 64), (1, 2, 4)), ((16, 12, 312), (1, 1, 2)), ((8, 6, 624), (1, 1, 1))]
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16'}


def window_kernels(dtype: torch.dtype) -> Iterator[tuple]:
    """Window attention for the shapes of the models: name, launch, types of tensors."""
    x = TYPES[dtype]
    types = dict(
        qkv=x, pad=x, table='*fp32', out=x, grad=x, grad_qkv=x, part_bias='*fp32',
        part_sums='*fp32', stats='*fp32', scale='fp32', grad_table='*fp32', grad_pad=x,
    )  # fmt: skip
    for heads, head_dim, window in ATTENTION:
        shape = 1, 1, 1, 3 * heads * head_dim
        arguments = 1.0, shape, dtype, heads, window, True, False
        queries, keys, reduce = attention._plan_backward(*arguments)
        launches = dict(forward=attention._plan_forward(*arguments), queries=queries, reduce=reduce)
        if keys:
            launches['keys'] = keys
        for kind, launch in launches.items():
            yield f'{kind} {heads} x {head_dim}, window {window}', launch, types


def convolution_kernels(dtype: torch.dtype) -> Iterator[tuple]:
    """Depth-wise convolutions with GELU, weight gradients, linear layers of folded blocks."""
    x = TYPES[dtype]
    types = dict(x=x, weight=x, bias=x, grad=x, residual=x, out=x, eps='fp32')
    for H, W, C in HIDDEN:
        shape, name = (64, C, H, W), f'{H} x {W} x {C}'
        launch = conv._plan_depthwise(shape, (9, 9, 3, 1), 1, False, True, True)
        yield f'depthwise {name}', launch, types
        launch = conv._plan_depthwise_weight(shape)
        yield f'depthwise weight {name}', launch, types | dict(out='*fp32')
    for K, N, norm in LINEAR:
        if norm:
            options = 1e-6, CHANNELS.get(K, K), True, True
            launch = linear._plan_norm_linear(64 * 3072, N, K, dtype, *options)
        else:
            launch = linear._plan_linear(64 * 3072, N, K, dtype, True, True, True)
        yield f'linear {K} to {N}', launch, types


def norm_kernels(dtype: torch.dtype) -> Iterator[tuple]:
    """Layer normalization of the streams, batch normalization with GELU in FFNs."""
    x = TYPES[dtype]
    types = dict.fromkeys(('count', 'mean', 'spread', 'weight', 'bias', 'sums', 'parts'), '*fp32')
    types |= dict(x=x, grad=x, skip=x, out=x, eps='fp32')
    for H, W, C in STREAMS:
        for stage in layer_norm.LAUNCH:
            launch = layer_norm._plan(stage, 64 * H * W, C, 1e-6)
            yield f'layer norm {stage} {H} x {W} x {C}', launch, types
    for H, W, C in HIDDEN:
        for stage in batch_norm.LAUNCH:
            options = () if stage == 'moments' else (1e-5, True)
            launch = batch_norm._plan(stage, 64 * H * W, C, dtype.itemsize, *options)
            yield f'batch norm {stage} {H} x {W} x {C}', launch, types
    names = 'out', 'running_mean', 'running_var', 'first', 'last', 'total'
    types |= dict.fromkeys(names, '*fp32') | dict(tracked='*i64', momentum='fp32', zeros=x)
    yield 'batch norm combine 128', batch_norm._plan_combine(1024, 128, 0.1, True), types
    yield 'sums of 10 x 128', sums._plan(1024, 10, 128, (1, 9)), types


def exchange_kernels(dtype: torch.dtype) -> Iterator[tuple]:
    """Sums of the streams of the models."""
    types = dict.fromkeys(('x', 'a', 'b', 'c', 'out'), TYPES[dtype])
    for (H, W, C), factors in EXCHANGES:
        for mode in ('nearest', 'bilinear'):
            launch = exchange._plan((64, C, H, W), factors, mode == 'bilinear', True)
            yield f'exchange {mode} {H} x {W} x {C}', launch, types


def dump(file: str, option: str) -> str:
    """The output of the disassembler for a file."""
    return subprocess.run([TOOL, option, file], capture_output=True, text=True, check=True).stdout


def resources(launch: Launch, types: dict, capability: int) -> dict:
    """Compile a kernel, and count the resources used by its machine code."""
    kernel, keywords = launch.kernel, launch.constants
    names = kernel.arg_names
    constants = {name: value for name, value in keywords.items() if name in names}
    options = {name: value for name, value in keywords.items() if name not in names}
    signature = {n: 'constexpr' if n in constants else types.get(n, 'i32') for n in names}
    pointers = [(i,) for i, n in enumerate(names) if signature[n].startswith('*')]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={pointer: [['tt.divisibility', 16]] for pointer in pointers},
    )
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        Path(file.name).write_bytes(compiled.asm['cubin'])
        usage, code = dump(file.name, '-res-usage'), dump(file.name, '-sass')
    registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
    loads = re.findall(r'\b(?:LDG|LDGSTS)\.E(\S*)', code)
    widths = [int((re.search(r'\.[US]?(\d+)', load) or [0, '32'])[1]) for load in loads]
    return dict(
        registers=int(registers),
        spilled=int(stack),
        shared=compiled.metadata.shared,
        wgmma=len(re.findall(r'\bHGMMA', code)),
        mma=len(re.findall(r'\bHMMA', code)),
        loads=' '.join(f'{widths.count(width)}x{width}' for width in sorted(set(widths))),
    )


KERNELS = [window_kernels, convolution_kernels, norm_kernels, exchange_kernels]


def main() -> None:
    """Print one line per kernel, shape and data type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--capability', type=int, nargs='+', default=[80, 90])
    parser.add_argument('--only', default='', help='regular expression that names must match')
    args = parser.parse_args()
    for capability in args.capability:
        for dtype, pointer in TYPES.items():
            for name, *kernel in (kernel for kernels in KERNELS for kernel in kernels(dtype)):
                name = f'sm_{capability} {pointer[1:]} {name}'
                if re.search(args.only, name):
                    found = resources(*kernel, capability)
                    counts = ', '.join(f'{key} {value}' for key, value in found.items())
                    print(f'{name}: {counts}', flush=True)


if __name__ == '__main__':
    main()

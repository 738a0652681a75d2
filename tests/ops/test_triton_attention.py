"""Window attention in Triton against the plain formula."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_on_cpu import DEVICE, REASON, make_tiles_small

from mmhrformer import ops
from mmhrformer.models.attention import LocalWindowSelfAttention
from mmhrformer.ops import triton_support
from mmhrformer.ops.windows import window_merge, window_partition

# Maps (B, H, W), heads, numbers of a head, window, pad_mask, whether there is a table: maps that
# windows divide, odd ones and ones smaller than a window, several windows a program.
CASES = [
    ((2, 3, 2), 2, 18, 1, False, True),
    ((1, 9, 5), 1, 18, 4, False, False),
    ((1, 9, 5), 2, 8, 4, True, True),
    ((1, 15, 8), 2, 32, 7, False, True),
    ((2, 7, 7), 1, 39, 7, True, True),
    ((1, 3, 2), 3, 40, 7, True, False),
    ((1, 8, 16), 1, 64, 8, False, True),
    ((1, 14, 9), 1, 40, 13, False, True),
    ((1, 4, 17), 1, 39, 15, True, True),
    ((1, 9, 8), 2, 18, 15, False, False),
]


@pytest.fixture
def triton_attention(monkeypatch):
    """The module; on a CPU with few programs, of which each takes milliseconds."""
    if REASON:
        pytest.skip(REASON)
    from mmhrformer.ops import triton_attention

    if DEVICE == 'cpu':
        make_tiles_small(monkeypatch)
    return triton_attention


def plain(qkv, pad, table, heads: int, window: int, scale: float, pad_mask: bool) -> Tensor:
    """The formula, by the reference implementations of the parts of the model."""
    _, H, W, C3 = qkv.shape
    attn = LocalWindowSelfAttention(C3 // 3, heads, window, with_rpe=False, pad_mask=pad_mask)
    attn.relative_position_bias_table = None if table is None else table
    windows = window_partition(qkv, window, pad).unflatten(-1, (3, heads, -1))
    with ops.use('reference'):
        out = ops.window_attention(windows, attn.attention_bias((H, W), windows), scale)
    return window_merge(out, window, (H, W))


def inputs(case, dtype=torch.float32, parameters=torch.float32) -> tuple[list, tuple]:
    """Random tensors qkv, pad and table (or None), and the other arguments."""
    (B, H, W), heads, head_dim, window, pad_mask, has_table = case
    torch.manual_seed(0)
    channels = 3 * heads * head_dim
    qkv = torch.randn(B, H, W, channels, dtype=dtype)
    pad = torch.randn(channels, dtype=parameters)
    table = torch.randn((2 * window - 1) ** 2, heads, dtype=parameters) if has_table else None
    tensors = [t if t is None else t.to(DEVICE).requires_grad_() for t in (qkv, pad, table)]
    return tensors, (heads, window, head_dim**-0.5, pad_mask)


def run(function, tensors: list, options: tuple, grad: Tensor | None = None) -> list[Tensor]:
    """Result of a function, and gradients of the tensors."""
    out = function(*tensors, *options)
    torch.manual_seed(1)
    grad = torch.randn(out.shape).to(out) if grad is None else grad
    leaves = [tensor for tensor in tensors if tensor is not None]
    grads = torch.autograd.grad(out, leaves, grad, materialize_grads=True)
    return [out.detach(), *grads]


def exact(tensors: list, options: tuple, grad: Tensor) -> list[Tensor]:
    """The expected result of :func:`run`, in float64 on the CPU; the bias is in all tokens."""
    doubles = [t if t is None else t.detach().cpu().double().requires_grad_() for t in tensors]
    out, of_qkv, of_pad, *of_table = run(plain, doubles, options, grad.cpu().double())
    return [out, of_qkv, of_pad + of_qkv.sum((0, 1, 2)), *of_table]


def error(x: Tensor, truth: Tensor) -> float:
    """Relative error; absolute if there is nothing to be relative to."""
    return ((x.cpu().double() - truth).norm() / (truth.norm() or 1.0)).item()


@pytest.mark.parametrize(
    ('case', 'dtype', 'limit'),
    [(case, torch.float32, 1e-5) for case in CASES]
    # Large windows take the same paths in all data types.
    + [
        pytest.param(case, torch.float16, 5e-3, marks=[pytest.mark.slow] if case[3] > 8 else [])
        for case in CASES
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_the_formula(triton_attention, case, dtype, limit):
    tensors, options = inputs(case, dtype)
    grad = torch.randn(*case[0], case[1] * case[2], dtype=dtype, device=DEVICE)
    results = run(triton_attention.window_attention, tensors, options, grad)
    for x, truth, like in zip(results, exact(tensors, options, grad), [tensors[0], *tensors]):
        assert x.dtype == like.dtype
        assert error(x, truth) < limit


def test_results_are_the_same_bits_each_time(triton_attention):
    tensors, options = inputs(CASES[3])
    results = [run(triton_attention.window_attention, tensors, options) for _ in range(2)]
    assert all(map(torch.equal, *results))


def test_large_biases_and_empty_batches(triton_attention):
    tensors, options = inputs(CASES[8])
    with torch.no_grad():
        tensors[2] *= 1000
    results = run(triton_attention.window_attention, tensors, options)
    assert all(result.isfinite().all() for result in results)
    tensors[0] = tensors[0].detach()[:0].requires_grad_()
    results = run(triton_attention.window_attention, tensors, options)
    assert [result.abs().sum() for result in results] == [0, 0, 0, 0]


def test_memory_formats_do_not_matter(triton_attention):
    tensors, options = inputs(CASES[2])
    strided = [
        t.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_() for t in tensors
    ]
    grad = torch.randn(16, 5, 9, 1, device=DEVICE).permute(3, 2, 1, 0)
    expected = run(triton_attention.window_attention, tensors, options, grad)
    results = run(triton_attention.window_attention, strided, options, grad)
    assert all(map(torch.equal, results, expected))


def test_it_is_an_ordinary_operator(triton_attention):
    for case in CASES[1:3]:
        tensors, options = inputs(case)
        values = [None if tensor is None else tensor.detach() for tensor in tensors]
        torch.library.opcheck(torch.ops.mmhrformer.window_attention, (*values, *options))
    grad = torch.randn(1, 9, 5, 16, device=DEVICE)
    backward = torch.ops.mmhrformer.window_attention_backward
    torch.library.opcheck(backward, (grad, *values, *options))


def test_it_can_be_compiled_and_exported(triton_attention):
    tensors, options = inputs(CASES[2])

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return triton_attention.window_attention(*tensors, *options)

    expected = run(triton_attention.window_attention, tensors, options)
    compiled = torch.compile(Module(), backend='aot_eager', fullgraph=True, dynamic=True)
    assert all(map(torch.equal, run(lambda *args: compiled(*args[:3]), tensors, options), expected))
    height = torch.export.Dim('height', min=2)
    shapes = {'tensors': ({1: height}, None, None)}
    program = torch.export.export(Module(), tuple(tensors), dynamic_shapes=shapes).module()
    low = tensors[0][:, :6]
    assert torch.equal(program(low, *tensors[1:]), Module()(low, *tensors[1:]))


@pytest.mark.parametrize(
    ('shapes', 'named'),
    [
        (((4, 4, 48), (48,), (9, 2)), 'qkv'),
        (((1, 4, 4, 50), (50,), (9, 2)), 'qkv'),
        (((1, 4, 4, 48), (16,), (9, 2)), 'pad'),
        (((1, 4, 4, 48), (48,), (2, 9)), 'table'),
    ],
)
def test_errors_name_the_tensor_that_does_not_fit(triton_attention, shapes, named):
    tensors = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=f'^{named} has shape'):
        triton_attention.window_attention(*tensors, num_heads=2, window=2, scale=1.0)


@pytest.mark.parametrize(
    ('channels', 'window', 'dtype', 'message'),
    [
        (48, 2, torch.float64, 'qkv is torch.float64'),
        (48, 17, torch.float32, 'window=17'),
        (240, 2, torch.float32, 'head_dim=80'),
    ],
)
def test_errors_name_what_no_kernel_computes(triton_attention, channels, window, dtype, message):
    qkv = torch.zeros(1, 4, 4, channels, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        triton_attention.window_attention(qkv, qkv[0, 0, 0], None, 1, window, scale=1.0)


SMALL, WIDE = r'\d+ x (24|32), window (7|15)', r'\d+ x 40, window (7|13|15)'
ALL = f'(forward|queries|keys) ({SMALL}|{WIDE})'
# Version of Triton -> gradients of B for which it spills 8 bytes.
SPILLING = {
    '3.7': {
        f'sm_80 {dtype} queries {heads} x 40, window 7: 8'
        for dtype in ('bf16', 'fp16')
        for heads in (2, 16)
    },
    '3.8': {
        'sm_90 fp16 queries 2 x 40, window 13: 8',
        'sm_90 fp16 queries 2 x 40, window 15: 8',
        'sm_90 fp16 queries 16 x 40, window 15: 8',
    },
}


@pytest.mark.parametrize(
    ('capability', 'only', 'kernels'),
    [
        (
            '90',
            'bf16 (.*(8 x 32, window 7|2 x 32, window 15|weight 16 x 12 x 512)'
            '|(queries|keys) 2 x 40, window (7|15)|exchange .* (64 x 48 x 78|32 x 24 x 64))',
            dict(forward=2, queries=4, reduce=2, keys=2, depthwise=1, exchange=4),
        ),
        *(
            pytest.param(
                capability, f'{dtype} {ALL}', dict(forward=9, queries=9, keys=4),
                marks=pytest.mark.slow,
            )
            for capability in ('80', '90')
            for dtype in ('bf16', 'fp16')
        ),
    ],
)  # fmt: skip
def test_kernels_compile_for_a_gpu_and_fit_into_its_registers(capability, only, kernels):
    if reason := triton_support.why_not():
        pytest.skip(reason)
    script = Path(__file__).parents[2] / 'benchmarks/triton_resources.py'
    result = subprocess.run(
        [sys.executable, script, '--capability', capability, '--only', only],
        env={**os.environ, 'TRITON_INTERPRET': '0', 'PYTHONPATH': str(script.parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    line = r'(sm_\d+ \w+ (\w+) .*): .* spilled (\d+),.* loads (.*)'
    rows = re.findall(line, result.stdout)
    assert Counter(kind for _, kind, *_ in rows) == kernels
    assert not [row for row in rows if 'x16' in row[3]], result.stdout  # one number at a time
    spilled = {f'{name}: {count}' for name, _, count, *_ in rows if count != '0'}
    assert spilled <= SPILLING.get(metadata.version('triton')[:3], set()), result.stdout


@pytest.mark.once
def test_the_package_does_not_import_triton():
    code = 'import sys, mmhrformer; assert "triton" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)

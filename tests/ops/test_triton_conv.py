"""The Triton kernels of depth-wise convolutions give what float64 gives, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_on_cpu import BOUNDS, DEVICE, REASON, check, make, make_tiles_small

if REASON:
    pytest.skip(REASON, allow_module_level=True)

from mmhrformer.ops.triton_conv import depthwise_conv, depthwise_gelu
from mmhrformer.ops.triton_linear import linear_gelu

# Maps (B, C, H, W) and strides.
MAPS = [
    ((2, 8, 1, 1), 1),
    ((1, 16, 1, 7), 2),
    ((1, 12, 5, 1), 2),
    ((1, 18, 3, 5), 1),
    ((1, 24, 6, 10), 1),
    ((1, 20, 4, 9), 2),
]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    if DEVICE == 'cpu':
        make_tiles_small(monkeypatch)


def plain(x, weight, bias, stride=1):
    return F.conv2d(x, weight, bias, stride, 1, groups=x.shape[1])


@pytest.mark.parametrize('has_bias', [True, False])
@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize(('size', 'stride'), MAPS)
def test_depthwise(size, stride, dtype, has_bias):
    C = size[1]
    tensors = [make(*size, dtype=dtype), make(C, 1, 3, 3, dtype=dtype)]
    tensors.append(make(C, dtype=dtype) if has_bias else None)
    check(
        lambda *args: depthwise_conv(*args, stride),
        lambda *args: plain(*args, stride),
        tensors,
        BOUNDS[dtype],
    )
    out = depthwise_conv(*tensors, stride)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize('size', [size for size, stride in MAPS if stride == 1])
def test_gelu(size, dtype):
    C = size[1]
    tensors = [make(*n, dtype=dtype, grad=False) for n in (size, (C, 1, 3, 3), (C,))]
    out, exact = depthwise_gelu(*tensors), F.gelu(plain(*(t.double() for t in tensors)))
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out - exact).norm() <= BOUNDS[dtype] * exact.norm()


def test_gelu_is_exact():
    """Nowhere further off than 1 + erf(x) is in float32."""
    x = torch.linspace(-12, 12, 4096, device=DEVICE).view(1, 32, 8, 16)
    identity = torch.zeros(32, 1, 3, 3, device=DEVICE)
    identity[:, :, 1, 1] = 1
    assert (depthwise_gelu(x, identity, None) - F.gelu(x.double())).abs().max() < 1e-6


def test_memory_formats_of_maps_and_weights():
    x, weight, bias = make(2, 12, 3, 4), make(12, 1, 3, 3), make(12)
    expected = depthwise_conv(x, weight, bias)
    fast = weight.detach().flatten(1).T.contiguous().T.view(12, 1, 3, 3)
    assert fast.stride()[2:] == (36, 12)
    turned = weight.detach().transpose(2, 3).contiguous().transpose(2, 3)
    for w in (fast, turned, weight.detach().contiguous(memory_format=torch.channels_last)):
        assert torch.equal(depthwise_conv(x, w, bias), expected)
    assert torch.equal(depthwise_conv(x.contiguous(), weight, bias), expected)


def test_gradients_have_the_same_bits_each_time():
    x, weight, bias = make(2, 8, 3, 10), make(8, 1, 3, 3), make(8)
    first, second = (
        torch.autograd.grad(depthwise_conv(x, weight, bias).sum(), (x, weight, bias))
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_nothing_to_compute():
    for function in (depthwise_conv, depthwise_gelu):
        assert function(make(0, 8, 4, 4), make(8, 1, 3, 3), None).shape == (0, 8, 4, 4)


def test_operators_are_well_formed():
    ops = torch.ops.mmhrformer
    sizes = (1, 8, 2, 3), (8, 1, 3, 3), (8,)
    x, weight, bias = (make(*size, grad=False) for size in sizes)
    for op, args in (
        (ops.depthwise_gelu, (x, weight, bias, 1, True)),
        (ops.depthwise_gelu, (x, weight, bias, 2, True)),
        (ops.depthwise_input_grad, (x, weight)),
        (ops.depthwise_weight_grad, (x, x, weight, bias)),
    ):
        torch.library.opcheck(op, args)


def test_compiled():
    backend = 'aot_eager' if DEVICE == 'cpu' else 'inductor'

    def infer(x, weight, bias, matrix):
        x = depthwise_gelu(x, weight, bias)
        return linear_gelu(x.permute(0, 2, 3, 1), matrix, None)

    def train(x, weight, bias, matrix):
        return depthwise_conv(x, weight, bias) * matrix[0, 0]

    tensors = make(2, 16, 3, 4), make(16, 1, 3, 3), make(16), make(16, 16)
    compiled = [torch.compile(f, backend=backend, fullgraph=True) for f in (infer, train)]
    for x in (tensors[0], make(3, 16, 2, 3)):
        results = []
        for forward, function in ((infer, train), compiled):
            with torch.no_grad():
                found = forward(x, *tensors[1:])
            out = function(x, *tensors[1:])
            grads = torch.autograd.grad(out.square().sum(), (x, *tensors[1:]))
            results.append([found, out, *grads])
        for eager, ours in zip(*results):
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        (lambda: depthwise_gelu(make(1, 8, 4, 4), make(8, 1, 5, 5), None), r'weight .*\(8, 1, 3'),
        (lambda: depthwise_conv(make(1, 8, 4, 4), make(8, 1, 3, 3), make(4)), r'bias .*\(8,\)'),
        (lambda: depthwise_conv(make(1, 8, 4, 4), make(8, 1, 3, 3), None, 3), 'stride is 3'),
    ],
)
def test_errors_name_the_argument_and_the_remedy(call, words):
    with pytest.raises(ValueError, match=words):
        call()

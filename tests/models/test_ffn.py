"""The FFN with a depth-wise convolution, against plain functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmhrformer import MODELS, DWConvFFN
from mmhrformer.models.ffn import DepthwiseConv2d


def make_ffn(**options) -> DWConvFFN:
    torch.manual_seed(0)
    ffn = DWConvFFN(embed_dims=6, feedforward_channels=10, **options).double()
    for name, tensor in ffn.state_dict().items():
        if name.endswith('running_var'):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif tensor.is_floating_point():
            nn.init.normal_(tensor)
    return ffn


def reference(ffn: DWConvFFN, x: torch.Tensor) -> torch.Tensor:
    p = {**ffn.state_dict(), **dict(ffn.named_parameters())}

    def norm_gelu(x, name):
        mean, var = p[f'{name}.running_mean'], p[f'{name}.running_var']
        if ffn.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        x = x * p[f'{name}.weight'][:, None, None] + p[f'{name}.bias'][:, None, None]
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    x = x.permute(0, 3, 1, 2)
    x = norm_gelu(F.conv2d(x, p['fc1.weight'], p['fc1.bias']), 'norm1')
    x = F.conv2d(x, p['dw3x3.weight'], p['dw3x3.bias'], padding=1, groups=10)
    x = norm_gelu(x, 'norm2')
    x = norm_gelu(F.conv2d(x, p['fc2.weight'], p['fc2.bias']), 'norm3')
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize('training', [False, True])
def test_equals_conv_norm_gelu_three_times(training):
    for size in ((7, 5), (1, 1), (2, 8)):
        ffn = make_ffn().train(training)
        x = torch.randn(3, *size, 6, dtype=torch.float64)
        torch.testing.assert_close(reference(ffn, x), ffn(x))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_gradients_are_those_of_the_formula(dtype, training):
    """Even if the incoming gradient has another memory layout than the output."""
    ffn = make_ffn().to(dtype).train(training)
    x = torch.randn(2, 9, 7, 6, dtype=dtype).requires_grad_()
    leaves = [x, *ffn.parameters()]
    weight = torch.randn(2, 6, 9, 7, dtype=dtype)
    for arriving in (weight, weight.contiguous(memory_format=torch.channels_last)):
        expected = torch.autograd.grad(
            (reference(ffn, x).permute(0, 3, 1, 2) * arriving).sum(), leaves
        )
        grads = torch.autograd.grad((ffn(x).permute(0, 3, 1, 2) * arriving).sum(), leaves)
        for grad, other in zip(grads, expected):
            torch.testing.assert_close(grad, other, atol=2e-4, rtol=2e-4)


def test_connects_neighboring_tokens_only():
    ffn = make_ffn().eval()
    x = torch.randn(1, 5, 5, 6, dtype=torch.float64)
    other = x.clone()
    other[:, 2, 2] += 1
    changed = (ffn(x) - ffn(other)).abs().amax((0, 3)) > 0
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(changed, expected)


def test_gradient_reaches_every_parameter():
    ffn = make_ffn().eval()  # in training, biases in front of a norm have none
    ffn(torch.randn(2, 4, 4, 6, dtype=torch.float64)).square().sum().backward()
    for name, parameter in ffn.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_normalization_can_be_chosen_and_the_config_stays_as_it_was():
    norm_cfg = dict(type='GN', num_groups=2, requires_grad=True)
    ffn = MODELS.build(
        dict(type='mmhrformer.DWConvFFN', embed_dims=6, feedforward_channels=10, norm_cfg=norm_cfg)
    )
    assert all(isinstance(norm, nn.GroupNorm) for norm in (ffn.norm1, ffn.norm2, ffn.norm3))
    assert norm_cfg == dict(type='GN', num_groups=2, requires_grad=True)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize(('stride', 'bias'), [(1, True), (2, False)])
def test_depthwise_convolution_is_the_plain_one_in_every_layout(stride, bias, grad, memory_format):
    conv = DepthwiseConv2d(6, stride=stride, bias=bias)
    x = torch.randn(2, 6, 7, 5).to(memory_format=memory_format)
    with torch.set_grad_enabled(grad):
        out = conv(x)
    expected = F.conv2d(x, conv.weight, conv.bias, stride, padding=1, groups=6)
    torch.testing.assert_close(out, expected)
    if grad:
        (ours,) = torch.autograd.grad(out.square().sum(), conv.weight)
        (plain,) = torch.autograd.grad(expected.square().sum(), conv.weight)
        torch.testing.assert_close(ours, plain)
    assert conv.weight.shape == (6, 1, 3, 3)


@pytest.mark.parametrize(
    'changed', [dict(padding=(2, 2), dilation=(2, 2)), dict(stride=(2, 1)), dict(stride=(1, 2))]
)
def test_depthwise_convolution_may_be_changed_later(changed):
    conv, x = DepthwiseConv2d(6), torch.randn(2, 6, 7, 5)
    vars(conv).update(changed)
    expected = F.conv2d(x, conv.weight, conv.bias, **{'padding': 1, **changed}, groups=6)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize('kind', ['DWConvFFN', 'FFN'])
@pytest.mark.parametrize('norm_cfg', [None, dict(type='LN'), dict(type='GN', num_groups=4)])
def test_normalizations_that_do_not_fit_are_refused(kind, norm_cfg):
    cfg = dict(type=f'mmhrformer.{kind}', embed_dims=6, feedforward_channels=24, norm_cfg=norm_cfg)
    with pytest.raises(ValueError, match=r"norm_cfg=.*dict\(type='BN'\)"):
        MODELS.build(cfg)

"""Recomputation in the backward pass does not change results."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from graphs import Graphs
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mmhrformer import HRFormer, ops
from mmhrformer.models.ffn import DepthwiseConv2d
from mmhrformer.ops import norm_gelu_conv
from mmhrformer.ops.recompute import is_plain

LAYOUTS = [torch.contiguous_format, torch.channels_last]


NORMS = {
    'batch': lambda: nn.BatchNorm2d(6),
    'one process': lambda: revert_sync_batchnorm(nn.SyncBatchNorm(6)),
    'average': lambda: nn.BatchNorm2d(6, momentum=None),
    'running': lambda: nn.BatchNorm2d(6).eval(),
    'no running': lambda: nn.BatchNorm2d(6, track_running_stats=False),
    'group': lambda: nn.GroupNorm(2, 6),
    'none': nn.Identity,
}


def make_norm(kind: str, dtype: torch.dtype) -> nn.Module:
    norm = NORMS[kind]().to(dtype)
    for name, tensor in norm.state_dict().items():
        if name == 'running_var':
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif tensor.is_floating_point():
            nn.init.normal_(tensor)
    return norm


CONVS = {
    'pointwise': lambda: nn.Conv2d(6, 4, 1),
    'depthwise': lambda: DepthwiseConv2d(6),
    'strided': lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False),
    'none': lambda: None,
}


def run(plain: bool, x: Tensor, norm: nn.Module, conv: nn.Module | None) -> list[Tensor]:
    """Output of two passes, gradients and running statistics."""
    norm, conv = copy.deepcopy(norm), copy.deepcopy(conv)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    for _ in range(2):
        if plain:
            out = F.gelu(norm(x))
            out = out if conv is None else conv(out)
        else:
            out = norm_gelu_conv(x, norm, conv)
    leaves = [x, *norm.parameters(), *([] if conv is None else conv.parameters())]
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves), *norm.buffers()]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('conv', CONVS)
@pytest.mark.parametrize(
    'norm', ['batch', 'one process', 'average', 'running', 'no running', 'group', 'none']
)
def test_is_norm_gelu_and_convolution(norm, conv, layout):
    torch.manual_seed(0)
    norm, conv = make_norm(norm, torch.float64), CONVS[conv]()
    conv = None if conv is None else conv.double().to(memory_format=layout)
    x = torch.randn(3, 6, 7, 5, dtype=torch.float64).contiguous(memory_format=layout)
    for ours, plain in zip(run(False, x, norm, conv), run(True, x, norm, conv)):
        torch.testing.assert_close(ours, plain)


def test_input_and_parameters_without_gradients_get_none():
    norm, conv = make_norm('batch', torch.float32), nn.Conv2d(6, 4, 1)
    norm.weight.requires_grad_(False)
    conv.weight.requires_grad_(False)
    norm_gelu_conv(torch.randn(2, 6, 4, 4), norm, conv).sum().backward()
    assert norm.weight.grad is None
    assert conv.weight.grad is None
    assert norm.bias.grad is not None
    assert conv.bias.grad is not None


def test_autocast_keeps_its_data_type_and_the_parameters_theirs():
    norm, conv = make_norm('batch', torch.float32), nn.Conv2d(6, 4, 1)
    x = torch.randn(2, 6, 4, 4)
    with torch.autocast('cpu', torch.bfloat16):
        half = norm_gelu_conv(x.bfloat16(), norm, conv)
    half.float().square().mean().backward()
    grads = [p.grad for p in (*norm.parameters(), *conv.parameters())]
    assert half.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads)
    full = norm_gelu_conv(x, copy.deepcopy(norm), conv)
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.1)


class Allocations(TorchDispatchMode):
    """Memory of the results of all operators, hooks on saved tensors or not."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out


def kept_bytes(function) -> int:
    """Bytes that a forward pass leaves allocated, besides its result."""
    with Allocations() as allocations:
        out = function()
    return sum(n for ref, n in allocations.storages.values() if not ref.expired()) - out.nbytes


@pytest.mark.parametrize(
    ('norm', 'share'), [('batch', 1 / 3), ('one process', 1 / 3), ('group', 2 / 3)]
)
def test_keeps_one_map_of_three(norm, share):
    norm, conv = make_norm(norm, torch.float32), DepthwiseConv2d(6)
    x = torch.randn(4, 6, 32, 32).requires_grad_()
    plain = kept_bytes(lambda: F.conv2d(F.gelu(norm(x * 2)), conv.weight, padding=1, groups=6))
    assert 3 * x.nbytes <= plain < 3.01 * x.nbytes
    assert kept_bytes(lambda: norm_gelu_conv(x * 2, norm, conv)) < (share + 0.01) * plain


def test_second_derivatives_are_those_of_the_reference():
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64).requires_grad_()
    norm, conv = make_norm('batch', torch.float64), DepthwiseConv2d(6).double()
    seconds = []
    for backend in ('cpu', 'reference'):
        with ops.use(backend):
            out = norm_gelu_conv(x, norm, conv)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*seconds)


def test_two_backward_passes_leave_the_statistics_of_one_forward_pass():
    norm, conv = make_norm('average', torch.float32), DepthwiseConv2d(6)
    x = torch.randn(2, 6, 4, 4).requires_grad_()
    out = norm_gelu_conv(x, norm, conv).sum()
    before = {name: tensor.clone() for name, tensor in norm.named_buffers()}
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert norm.num_batches_tracked == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.named_buffers())


@pytest.mark.parametrize('kind', ['batch', 'average'])
def test_statistics_are_updated_after_a_backward_pass_as_before(kind):
    norm = make_norm(kind, torch.float32)
    plain = copy.deepcopy(norm)
    for _ in range(2):
        x = torch.randn(2, 6, 4, 4).requires_grad_()
        norm_gelu_conv(x, norm).sum().backward()
        plain(x)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(plain.named_buffers()))


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(register: str, conv: bool) -> tuple[nn.Module, nn.Module]:
    modules = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
    getattr(modules[conv], register)(lambda *args: None)
    return modules


NOTICED = {
    'subclass': lambda: (nn.BatchNorm2d(6), Doubled(6, 4, 1)),
    'spectral norm': lambda: (nn.BatchNorm2d(6), spectral_norm(nn.Conv2d(6, 4, 1))),
    'orthogonal': lambda: (nn.BatchNorm2d(6), orthogonal(nn.Conv2d(6, 4, 1))),
    'pruned': lambda: (
        nn.BatchNorm2d(6),
        prune.random_unstructured(nn.Conv2d(6, 4, 1), 'weight', 2),
    ),
    'forward hook': lambda: hooked('register_forward_hook', conv=True),
    'pre-hook': lambda: hooked('register_forward_pre_hook', conv=True),
    'backward hook': lambda: hooked('register_full_backward_hook', conv=True),
    'hook of the norm': lambda: hooked('register_forward_hook', conv=False),
}


@pytest.mark.parametrize('kind', NOTICED)
def test_modules_that_would_notice_are_called_once(kind):
    norm, conv = NOTICED[kind]()
    calls = []
    norm.forward = lambda x, forward=norm.forward: (calls.append('norm'), forward(x))[1]
    conv.forward = lambda x, forward=conv.forward: (calls.append('conv'), forward(x))[1]
    norm_gelu_conv(torch.randn(2, 6, 4, 4).requires_grad_(), norm, conv).sum().backward()
    assert calls == ['norm', 'conv']


@pytest.mark.parametrize('kind', NOTICED)
def test_what_would_be_noticed_is_not_plain(kind):
    norm, conv = NOTICED[kind]()
    assert not (is_plain(norm, nn.BatchNorm2d) and is_plain(conv, nn.Conv2d))


def test_hooks_on_all_modules_are_noticed():
    conv = nn.Conv2d(6, 4, 1)
    assert is_plain(conv, nn.Conv2d)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert not is_plain(conv, nn.Conv2d)
    handle.remove()
    assert is_plain(conv, nn.Conv2d)


@pytest.mark.once
@pytest.mark.parametrize('training', [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_to_one_graph_and_only_once_per_size(training):
    arch = dict(channels=(4, 8, 8, 8), num_heads=(1, 2, 2, 2), num_modules=(1, 1, 1), num_blocks=1)
    model = HRFormer(arch, out_indices=(0,)).train(training)
    plain = copy.deepcopy(model)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=False)
    for size in ((64, 48), (32, 40), (64, 48), (32, 40)):
        x = torch.randn(2, 3, *size)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(compiled(x)[0], plain(x)[0], atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2


@pytest.mark.parametrize('backend', ['cpu', 'cuda'])
def test_tensors_without_memory(backend):
    """On the meta device all addresses are 0: weights must not be mistaken for the maps."""
    norm, conv = nn.BatchNorm2d(4).to('meta'), nn.Conv2d(4, 6, 1).to('meta')
    x = torch.zeros(2, 4, 5, 5, device='meta', requires_grad=True)
    with ops.use(backend):
        ops.norm_gelu_conv(x, norm, conv).sum().backward()
    assert all(p.grad.shape == p.shape for p in (x, *norm.parameters(), *conv.parameters()))

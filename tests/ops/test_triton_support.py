"""The reasons why Triton kernels cannot run."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmhrformer import ops
from mmhrformer.ops import kernels, triton_support

CPU, CUDA = torch.device('cpu'), torch.device('cuda')


def why_not(device: torch.device | None = None) -> str:
    return triton_support.why_not.__wrapped__(device)  # asked anew


@pytest.fixture
def everything(monkeypatch):
    """A GPU on which Triton works; the tests take something away."""
    monkeypatch.setattr(torch, '__version__', '2.11.0+cu130')
    monkeypatch.setattr(triton_support, 'find_spec', lambda name: ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, 'triton', SimpleNamespace(__version__='3.6.0'))
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)


def test_nothing_is_missing(everything):
    assert why_not() == why_not(CUDA) == ''


def test_old_torch(everything, monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.6.1')
    assert why_not() == 'torch 2.6.1 comes with a Triton older than 3.3: install torch>=2.7'


def test_no_triton(everything, monkeypatch):
    monkeypatch.setattr(triton_support, 'find_spec', lambda name: None)
    assert why_not(CUDA) == 'Triton is not installed: install triton>=3.3'


def test_old_triton(everything, monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', SimpleNamespace(__version__='3.2.0'))
    assert why_not(CUDA) == 'triton 3.2.0 is too old: install triton>=3.3'


def test_other_devices(everything, monkeypatch):
    assert why_not(CPU) == 'Triton kernels run on GPUs, not on cpu'
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert why_not(CPU) == ''
    assert why_not(torch.device('meta')) == 'Triton kernels run on GPUs, not on meta'


def test_other_gpus(everything, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    assert why_not(CUDA) == 'cuda has compute capability (7, 5), the kernels need (8, 0)'
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert 'is not built for CUDA: the kernels need an NVIDIA GPU' in why_not(CUDA)


def stand_in_for_kernel(monkeypatch) -> SimpleNamespace:
    """Record the trials, and how often Triton's own launch was chosen."""
    linspace = torch.linspace

    def on_cpu(*args, device, **options) -> torch.Tensor:
        return linspace(*args, **options)

    monkeypatch.setattr(torch, 'linspace', on_cpu)
    launch = SimpleNamespace(given_up=0)
    launch.use_own_launch_only = lambda: vars(launch).update(given_up=launch.given_up + 1)
    kernel = SimpleNamespace(layer_norm=lambda x, *args: x, launch=launch)
    for name, module in dict(triton_layer_norm=kernel, triton_launch=launch).items():
        monkeypatch.setitem(sys.modules, f'mmhrformer.ops.{name}', module)
        monkeypatch.setattr(ops, name, module, raising=False)
    return kernel


def test_no_compiler(monkeypatch):
    def fail(*args):
        raise RuntimeError('Failed to find C compiler. Please specify via CC environment variable.')

    monkeypatch.setattr(triton_support, 'why_not', lambda device: '')
    kernel = stand_in_for_kernel(monkeypatch)
    assert kernels.why_not.__wrapped__(CUDA) == ''
    kernel.layer_norm, said = fail, []
    monkeypatch.setattr(kernels, 'print_log', lambda text, *_: said.append(text))
    reason = kernels.why_not.__wrapped__(CUDA)
    assert reason.startswith('Triton fails on cuda, RuntimeError: Failed to find C compiler')
    assert said == [f'The kernels are not used: {reason}']


@pytest.fixture
def _no_defaults():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures('_no_defaults')
def test_what_comes_by_chance_does_not_disable_the_kernels(monkeypatch):
    """A default data type, a mode of torch, or full memory at the first call."""
    monkeypatch.setattr(triton_support, 'why_not', lambda device: '')
    kernel, tried = stand_in_for_kernel(monkeypatch), []
    kernel.layer_norm = lambda x, *args: tried.append(x) or x
    torch.set_default_dtype(torch.float64)
    with FakeTensorMode():
        assert kernels.why_not.__wrapped__(CUDA) == ''
    assert [(type(x), x.dtype) for x in tried] == [(torch.Tensor, torch.float32)] * 2
    assert kernel.launch.given_up == 0

    def fail(*args):
        raise torch.cuda.OutOfMemoryError('CUDA out of memory')

    kernel.layer_norm = fail
    with pytest.raises(torch.cuda.OutOfMemoryError):
        kernels.why_not.__wrapped__(CUDA)


@pytest.mark.parametrize('second', ['equal', 'other numbers', 'an error'])
def test_launches_around_triton_are_tried(monkeypatch, second):
    """If direct launches differ from Triton's own, the latter is used."""
    kernel, calls = stand_in_for_kernel(monkeypatch), []
    monkeypatch.setattr(triton_support, 'why_not', lambda device: '')

    def run(x: torch.Tensor, *args) -> torch.Tensor:
        calls.append(x)
        if len(calls) == 2 and second == 'an error':
            raise TypeError('function takes exactly 9 arguments (8 given)')
        return x + (len(calls) == 2 and second == 'other numbers')

    kernel.layer_norm = run
    assert kernels.why_not.__wrapped__(CUDA) == ''
    assert kernel.launch.given_up == (second != 'equal')

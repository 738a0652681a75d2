"""A model is an ordinary PyTorch module: what is done to modules can be done to its parts."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
import torch
from graphs import can_compile_blocks
from needs import needs
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from mmhrformer import HRFormer, HRFormerFusion, compile_blocks, fuse_for_inference, ops
from mmhrformer.analysis.complexity import complexity
from mmhrformer.deploy.fuse import FusedDWConvFFN, FusedWindowAttention, fold_batch_norm

pytestmark = pytest.mark.once
ARCH = dict(channels=(8, 8, 8, 16), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
FORMATS = [torch.contiguous_format, torch.channels_last]
BLOCK = 'stage3.0.branches.1.0'


def make_model(**options) -> HRFormer:
    """A backbone whose normalizations have seen an image, in evaluation mode."""
    return copy.deepcopy(_make_model(**options))


@cache
def _make_model(**options) -> HRFormer:
    torch.manual_seed(0)
    model = HRFormer(ARCH, window_size=3, **options)
    for parameter in model.parameters():  # biases are zero otherwise
        nn.init.normal_(parameter, std=0.3) if parameter.dim() == 1 else None
    model(make_images(4))
    return model.eval()


def make_images(batch: int = 2, size: tuple[int, int] = (40, 64)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, x: Tensor, with_grad: bool) -> list[Tensor]:
    with torch.set_grad_enabled(with_grad):
        return [stream.detach() for stream in model(x)]


def largest_difference(ours: list[Tensor], other: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, other, strict=True))


# ------------------------------------------------------------------ memory formats


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('fold', [False, True])
def test_streams_come_in_the_memory_format_of_the_images(fold, training):
    model = make_model(with_cp=training)
    model = fuse_for_inference(model) if fold else model.train(training)
    neck = HRFormerFusion(ARCH['channels'], (4, 4, 4, 4), 8).train(training)
    for memory_format in FORMATS:
        streams = model(make_images().contiguous(memory_format=memory_format))
        for out in (*streams, *neck(streams)):
            assert out.is_contiguous(memory_format=memory_format)


def test_weights_in_channels_last_decide_too_as_in_stock_backbones():
    model = make_model().to(memory_format=torch.channels_last)
    for stream in model(make_images()):
        assert stream.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------ hooks


@pytest.mark.parametrize('with_cp', [False, True])
def test_every_module_is_called_with_gradients_as_without(with_cp):
    model = make_model(with_cp=with_cp)
    calls = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *args, name=name: calls.update([name]))
    outputs(model, make_images(), with_grad=False)
    without, _ = Counter(calls), calls.clear()
    outputs(model, make_images(), with_grad=True)
    assert calls == without
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    assert leaves <= calls.keys()


def test_hooks_run_once_in_a_training_step():
    model = make_model().train()
    calls = Counter()
    for name, module in model.named_modules():
        if name.startswith(f'{BLOCK}.') and not name.endswith('drop_path'):  # is called twice
            module.register_forward_hook(lambda *args, name=name: calls.update([name]))
            module.register_full_backward_hook(lambda *args, name=name: calls.update([f'{name} <']))
    model(make_images())[0].sum().backward()
    assert set(calls.values()) == {1}
    assert len(calls) == 2 * (len(list(model.get_submodule(BLOCK).modules())) - 2)


def test_a_hook_can_change_what_a_module_returns():
    for with_grad in (False, True):
        model, x = make_model(), make_images()
        before = outputs(model, x, with_grad)
        model.get_submodule(f'{BLOCK}.ffn.norm2').register_forward_hook(lambda *args: args[2] * 2)
        assert largest_difference(outputs(model, x, with_grad), before) > 1e-3


# ------------------------------------------------------------------ replaced parts


class LowRank(nn.Module):
    """A layer with a learned update beside it, of which nothing but the call is known."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        is_conv = isinstance(layer, nn.Conv2d)
        out, inside = layer.weight.shape[:2]
        inside = layer.in_channels if is_conv else inside
        kernel = dict(kernel_size=1, stride=layer.stride) if is_conv else {}
        make = nn.Conv2d if is_conv else nn.Linear
        self.down, self.up = (
            make(inside, 2, bias=False, **kernel),
            make(2, out, bias=False, **(dict(kernel_size=1) if is_conv else {})),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class Scaled(nn.Conv2d):
    """A convolution with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


def scaled(conv: nn.Conv2d) -> nn.Conv2d:
    conv.__class__, conv.factor = Scaled, nn.Parameter(torch.tensor(1.5))
    return conv


def quantized_in_training(conv: nn.Conv2d) -> nn.Module:
    conv.qconfig = torch.ao.quantization.get_default_qat_qconfig('fbgemm')
    return torch.ao.nn.qat.Conv2d.from_float(conv)


class PerChannel(nn.Module):
    """A normalization without statistics."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(norm.num_features))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight[:, None, None]).contiguous()


REPLACEMENTS = {
    'low rank, qkv': ('attn.qkv', LowRank),
    'low rank, proj': ('attn.proj', LowRank),
    'low rank, fc1': ('ffn.fc1', LowRank),
    'low rank, dw3x3': ('ffn.dw3x3', LowRank),
    'low rank, fc2': ('ffn.fc2', LowRank),
    'subclass, fc1': ('ffn.fc1', scaled),
    'subclass, fc2': ('ffn.fc2', scaled),
    'QAT, fc2': ('ffn.fc2', quantized_in_training),
    'norm1': ('ffn.norm1', PerChannel),
    'norm2': ('ffn.norm2', PerChannel),
    'norm3': ('ffn.norm3', PerChannel),
    'layer norm': ('norm1', lambda norm: nn.LayerNorm(norm.normalized_shape, bias=False)
                   if torch.__version__ >= '2.1' else nn.Identity()),
    'pruned': ('ffn.fc2', lambda m: prune.random_unstructured(m, 'weight', 0.5)),
    'pruned, dw3x3': ('ffn.dw3x3', lambda m: prune.random_unstructured(m, 'weight', 0.5)),
    'pruned, qkv': ('attn.qkv', lambda m: prune.ln_structured(m, 'weight', 0.5, n=2, dim=0)),
    'spectral norm': ('ffn.fc1', spectral_norm),
    'old spectral norm': ('ffn.dw3x3', nn.utils.spectral_norm),
    'orthogonal': ('attn.proj', orthogonal),
    'Identity': ('ffn.norm2', lambda m: nn.Identity()),
}  # fmt: skip


def replace(model: nn.Module, kind: str) -> nn.Module:
    """Replace a part of a block; return what stands there now."""
    name, make = REPLACEMENTS[kind]
    parent, _, child = f'{BLOCK}.{name}'.rpartition('.')
    torch.manual_seed(2)
    part = make(model.get_submodule(f'{parent}.{child}'))
    setattr(model.get_submodule(parent), child, part)
    return part


def prepare(setting: str) -> tuple[HRFormer, Tensor]:
    model, x = make_model(with_cp=setting == 'with_cp'), make_images()
    if setting == 'channels_last':
        model, x = (v.to(memory_format=torch.channels_last) for v in (model, x))
    return model, x


@pytest.mark.parametrize(
    'setting',
    ['plain', 'with_cp', 'channels_last', pytest.param('compiled', marks=can_compile_blocks)],
)
@pytest.mark.parametrize('kind', REPLACEMENTS)
def test_replaced_parts_compute_and_learn(kind, setting):
    if setting == 'compiled' and kind.split(',')[0] not in ('low rank', 'subclass', 'pruned'):
        return  # takes seconds each
    model, x = prepare(setting)
    before = outputs(model, x, with_grad=False)
    part = replace(model, kind)
    model.eval()
    with torch.no_grad(), ops.use('reference'):
        expected = model(x)
    assert largest_difference(list(expected), before) > 1e-5
    if setting == 'compiled':
        compile_blocks(model, backend='eager')
    for with_grad in (False, True):
        assert largest_difference(outputs(model, x, with_grad), list(expected)) < 1e-4
    sum(stream.square().mean() for stream in model(x)).backward()
    for name, parameter in part.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize('kind', REPLACEMENTS)
def test_folding_leaves_alone_what_it_does_not_know(kind):
    model, x = make_model(), make_images()
    part = type(replace(model, kind))
    model.eval()
    expected = outputs(model, x, False)  # and weights that are computed anew have no gradients
    folded = fuse_for_inference(model)
    assert largest_difference(outputs(folded, x, False), expected) < 1e-4
    assert kind in ('Identity', 'layer norm') or any(type(m) is part for m in folded.modules())
    folds = [m for m in folded.modules() if isinstance(m, (FusedWindowAttention, FusedDWConvFFN))]
    assert len(folds) in (2 * 9 - 1, 2 * 9)


def test_any_layer_can_be_replaced_and_counted():
    """The first convolution, too, by whose weights the type of images is checked."""
    model, x = make_model(), make_images()
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, LowRank(module))
    outputs(model, x, with_grad=True)
    assert (
        complexity(model, (1, 3, 64, 64))['macs'] > complexity(make_model(), (1, 3, 64, 64))['macs']
    )


def test_folded_parts_can_be_replaced():
    model, x = make_model(), make_images()
    folded = fuse_for_inference(model)
    before = outputs(folded, x, False)
    for kind in ('low rank, qkv', 'low rank, proj'):
        replace(folded, kind)
    assert largest_difference(outputs(folded, x, False), before) > 1e-4
    conv = folded.get_submodule(BLOCK).ffn.fc2
    conv.register_forward_hook(lambda *args: args[2] * 0)
    assert largest_difference(outputs(folded, x, False), before) > 1e-3


@pytest.mark.parametrize('fold_first', [False, True])
def test_dynamic_quantization_and_folding(fold_first):
    model, x = make_model(), make_images()
    steps = [
        fuse_for_inference,
        lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, torch.qint8),
    ]
    changed = model
    for step in steps if fold_first else reversed(steps):
        changed = step(changed)
    expected = outputs(model, x, False)
    scale = max(stream.abs().max().item() for stream in expected)
    assert 0 < largest_difference(outputs(changed, x, False), expected) < 0.2 * scale


@needs('mmpretrain')
def test_lora_of_mmpretrain():
    from mmpretrain.models import LoRAModel

    backbone = dict(type='mmhrformer.HRFormer', arch=ARCH, window_size=3)
    targets = [dict(type='qkv'), dict(type='proj')]
    torch.manual_seed(0)
    model = LoRAModel(backbone, alpha=4, rank=2, targets=targets)
    for name, parameter in model.named_parameters():
        if 'lora_up' in name:
            nn.init.normal_(parameter, std=0.1)
    x = make_images()
    model(x)[0].square().mean().backward()
    learned = [p for n, p in model.named_parameters() if 'lora' in n]
    assert len(learned) == 2 * 2 * 9
    assert any(parameter.grad is not None for parameter in learned)
    model.eval()
    expected = outputs(model, x, with_grad=True)
    assert largest_difference(outputs(model, x, with_grad=False), expected) < 1e-4
    assert largest_difference(outputs(fuse_for_inference(model), x, False), expected) < 1e-4


# ------------------------------------------------------------------ folding of batch normalization


class ReLUBetween(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))


class TransposedBetween(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 3, 1), nn.BatchNorm2d(3))


class SharedConv(nn.Module):
    """One convolution, a normalization for each of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 3, 1)
        self.first = nn.Sequential(conv, nn.BatchNorm2d(3))
        self.second = nn.Sequential(conv, nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(2 * x)


class SharedNorm(SharedConv):
    def __init__(self) -> None:
        super().__init__()
        self.second[0] = nn.Conv2d(3, 3, 1)
        self.second[1] = self.first[1]


class BatchStatistics(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))


class WithoutScale(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3, affine=False))


class Circular(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 3, padding=1, padding_mode='circular'), nn.BatchNorm2d(3))


class NormFirst(nn.Module):
    """Calls its layers in another order than it lists them, as blocks with pre-activation do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class Reversed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self[0](self[1](x))


@pytest.mark.parametrize(
    'make',
    [
        ReLUBetween,
        TransposedBetween,
        SharedConv,
        SharedNorm,
        BatchStatistics,
        WithoutScale,
        Circular,
        NormFirst,
        Reversed,
    ],
)
def test_folding_changes_nothing(make):
    torch.manual_seed(0)
    model = make().train()
    model(torch.randn(8, 3, 5, 5) * 3 + 1)
    model.eval()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(fold_batch_norm(copy.deepcopy(model))(x), model(x))


# ------------------------------------------------------------------ functions of torch.func


def loss_of(model: nn.Module, buffers: dict) -> Callable:
    def loss(parameters: dict, image: Tensor) -> Tensor:
        streams = functional_call(model, (parameters, buffers), (image[None],))
        return sum(stream.square().mean() for stream in streams)

    return loss


@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_gradients_of_each_sample():
    model, x = make_model(), make_images(size=(32, 36))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = loss_of(model, dict(model.named_buffers()))
    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        model.zero_grad()
        loss(dict(model.named_parameters()), image).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][i], parameter.grad, atol=1e-4, rtol=1e-3)


def test_directional_derivatives():
    model, x = make_model().double(), make_images(1, (32, 32)).double()
    direction = torch.randn(x.shape, dtype=x.dtype)
    _, tangent = jvp(lambda z: model(z)[0], (x,), (direction,))
    step = 1e-6 * direction
    difference = (model(x + step)[0] - model(x - step)[0]) / 2e-6
    torch.testing.assert_close(tangent, difference, atol=1e-5, rtol=1e-5)


def test_several_models_at_once():
    models = [make_model(), make_model()]
    with torch.no_grad():
        models[1].conv1.weight.mul_(1.1)
    parameters, buffers = stack_module_state(models)
    base, x = copy.deepcopy(models[0]).to('meta'), make_images()
    outs = vmap(lambda p, b: functional_call(base, (p, b), (x,))[0])(parameters, buffers)
    for out, model in zip(outs, models):
        torch.testing.assert_close(out, model(x)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_second_derivatives(training, with_cp):
    model = make_model(with_cp=with_cp).double().train(training)
    x = make_images(2, (32, 32)).double().requires_grad_()
    seconds = []
    for form in ('cpu', 'reference'):
        with ops.use(form):
            (first,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
    scale = seconds[1].abs().max()
    torch.testing.assert_close(seconds[0] / scale, seconds[1] / scale)


def test_hessian_of_a_normalization():
    model = make_model().double()
    x, name = make_images(1, (32, 32)).double(), f'{BLOCK}.ffn.norm3.bias'
    buffers = dict(model.named_buffers())

    def loss(bias: Tensor) -> Tensor:
        return functional_call(model, ({name: bias}, buffers), (x,))[0].square().mean()

    bias = model.get_parameter(name).detach()
    plain = torch.autograd.functional.hessian(loss, bias)
    torch.testing.assert_close(hessian(loss)(bias), plain)
    torch.testing.assert_close(plain, plain.T)


# ------------------------------------------------------------------ copies, files, devices


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('copied', [copy.deepcopy, saved, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize('fold', [False, True])
def test_copies_are_equal(fold, copied):
    model, x = make_model(), make_images()
    model = fuse_for_inference(model) if fold else model
    model(x)  # leaves nothing behind that could not be copied
    again = copied(model)
    assert largest_difference(outputs(again, x, False), outputs(model, x, False)) == 0
    if fold:
        assert again.eval() is again
        with pytest.raises(RuntimeError, match='cannot be trained'):
            again.train()


def test_another_process_reads_a_folded_model(tmp_path):
    model, x = fuse_for_inference(make_model()), make_images()
    torch.save((model, x, model(x)[0]), tmp_path / 'model.pt')
    code = (
        'import sys, torch; model, x, out = torch.load(sys.argv[1], weights_only=False); '
        'assert torch.allclose(model(x)[0], out, atol=1e-5)'
    )
    subprocess.run([sys.executable, '-c', code, tmp_path / 'model.pt'], check=True)


@pytest.mark.parametrize('assign', [False, True])
def test_models_can_be_built_without_memory(assign):
    model, x = make_model(drop_path_rate=0.2), make_images()
    with torch.device('meta'):
        empty = HRFormer(ARCH, window_size=3, drop_path_rate=0.2)
        HRFormer(ARCH, attn_cfg=dict(type='mmhrformer.ShiftedWindowSelfAttention'))
        HRFormerFusion(ARCH['channels'])
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    assert empty(x.to('meta'))[0].shape == model(x)[0].shape
    if not assign:
        empty.to_empty(device='cpu')
    empty.load_state_dict(model.state_dict(), assign=assign)
    assert not any(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    empty.eval()
    assert largest_difference(outputs(empty, x, False), outputs(model, x, False)) == 0


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('with_cp', [False, True])
def test_a_batch_without_images(with_cp, training):
    model = make_model(with_cp=with_cp).eval()
    model.train(training)
    for batch_norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        before = batch_norm.running_mean.clone()
    x = torch.rand(0, 3, 64, 96, requires_grad=True)
    streams = model(x)
    sum(stream.sum() for stream in streams).backward()
    assert [stream.shape[0] for stream in streams] == [0] * 4
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert torch.equal(batch_norm.running_mean, before)
    assert fuse_for_inference(model)(x)[0].shape == streams[0].shape


@needs('mmpose')
def test_operators_that_want_contiguous_maps():
    """Deformable convolutions, as in DEKR, RepPoints and VFNet, check it."""
    from mmcv.ops import DeformConv2dPack

    for stream in make_model().train()(make_images())[:2]:
        out = DeformConv2dPack(stream.shape[1], 4, 3, padding=1)(stream)
        out.sum().backward(retain_graph=True)
        assert stream.view(len(stream), -1).shape[1] > 0


def test_learning_after_inference_mode():
    model, x = make_model(), make_images()
    with torch.inference_mode():
        model(x)
    model(x)[0].sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0


def test_a_model_made_in_inference_mode_infers():
    with torch.inference_mode():
        model = make_model()
        folded = fuse_for_inference(model)
        assert largest_difference(list(folded(make_images())), list(model(make_images()))) < 1e-4

"""Blocks compiled part by part: equal results, few graphs, and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from graphs import Graphs, can_compile_blocks
from torch import nn

from mmhrformer import HRFormer, compile_blocks, fuse_for_inference
from mmhrformer.deploy import compile as compiled
from mmhrformer.deploy.fuse import FusedBlock
from mmhrformer.ops import cpu, kernels

ARCH = dict(channels=(4, 8, 8, 16), num_heads=(1, 2, 2, 2), num_modules=(1, 2, 2), num_blocks=2)
KINDS_OF_BLOCKS = 4  # one for each stream


def make_model(**options) -> HRFormer:
    torch.manual_seed(0)
    return HRFormer(ARCH, window_size=3, out_indices=(0,), **options)


def train(model: nn.Module, size: tuple[int, int] = (64, 32)) -> dict[str, torch.Tensor]:
    """The output, gradients and running statistics of a training step."""
    torch.manual_seed(1)
    out = model(torch.randn(2, 3, *size).to(model.conv1.weight))[0]
    model.zero_grad()
    out.square().mean().backward()
    grads = {f'{n}.grad': p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {'out': out.detach(), **grads, **dict(model.named_buffers())}


@can_compile_blocks
@pytest.mark.parametrize('with_cp', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_is_the_same(with_cp):
    plain = make_model(drop_path_rate=0.2, with_cp=with_cp).train().double()
    model = compile_blocks(copy.deepcopy(plain), backend='aot_eager')
    for _ in range(2):
        expected, values = train(plain), train(model)
        assert expected.keys() == values.keys()
        for name, value in expected.items():
            torch.testing.assert_close(values[name], value, rtol=1e-6, atol=1e-9)


@can_compile_blocks
@pytest.mark.parametrize('num_blocks', [1, 3])
def test_graphs_do_not_become_more_with_depth(num_blocks):
    model = HRFormer({**ARCH, 'num_blocks': num_blocks}, out_indices=(0,), drop_path_rate=0.2)
    graphs = Graphs()
    compile_blocks(model.train(), backend=graphs)
    train(model)
    assert len(graphs) == 2 * KINDS_OF_BLOCKS
    train(model)
    assert len(graphs) == 2 * KINDS_OF_BLOCKS


@can_compile_blocks
def test_many_sizes_are_compiled():
    """torch by itself would stop at eight versions and go on uncompiled."""
    model = make_model().train()
    graphs = Graphs()
    compile_blocks(model, backend=graphs)
    for side in (32, 64, 96, 128):
        train(model, (side, 64))
    assert len(graphs) == 4 * 2 * KINDS_OF_BLOCKS


@can_compile_blocks
@pytest.mark.parametrize('folded', [False, True])
def test_inference_is_the_same(folded):
    plain = make_model().eval()
    plain = fuse_for_inference(plain) if folded else plain
    graphs = Graphs()
    model = compile_blocks(copy.deepcopy(plain), backend=graphs)
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], plain(x)[0], atol=1e-5, rtol=1e-5)
    assert len(graphs) == 2 * KINDS_OF_BLOCKS


@can_compile_blocks
def test_compiled_parts_of_folded_blocks_are_used(monkeypatch):
    """Kernels for whole blocks, which take the weights of the parts, would bypass them."""
    model = fuse_for_inference(make_model().eval())
    x, blocks = torch.randn(1, 3, 64, 48), []
    monkeypatch.setattr(kernels, 'LINEAR_DTYPES', kernels.DTYPES)  # the model is in float32
    monkeypatch.setattr(cpu, 'has_folded_block', kernels.has_folded_block)
    fake = lambda x, block: (blocks.append(block), x)[1]  # noqa: E731
    monkeypatch.setattr(cpu, 'folded_block', fake, raising=False)
    with torch.no_grad():
        model(x)
        assert len(blocks) == len([m for m in model.modules() if isinstance(m, FusedBlock)]) > 0
        blocks.clear()
        graphs = Graphs()
        compile_blocks(model, backend=graphs)(x)
    assert not blocks
    assert len(graphs) == 2 * KINDS_OF_BLOCKS


@can_compile_blocks
def test_weights_keep_their_names_and_copies_are_plain():
    model = make_model().train()
    names = list(model.state_dict())
    graphs = Graphs()
    assert compile_blocks(model, backend=graphs) is model
    assert list(model.state_dict()) == names
    train(copy.deepcopy(model))
    assert not graphs


@can_compile_blocks
def test_models_without_blocks_are_refused():
    with pytest.raises(ValueError, match='model=Linear has no HRFormerBlock'):
        compile_blocks(nn.Linear(2, 2))


def test_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, 'TORCH_VERSION', '2.1.2')
    with pytest.raises(RuntimeError, match=r'needs torch 2\.5 or newer, but this is 2\.1\.2'):
        compile_blocks(make_model())

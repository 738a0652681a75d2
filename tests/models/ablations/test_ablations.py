"""The parts of the ablations, and the backbone made of them."""

from __future__ import annotations

import copy

import golden
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmhrformer import (
    FFN,
    MODELS,
    DWConvFFN,
    HRFormer,
    HRFormerBlock,
    LocalWindowSelfAttention,
    ShiftedWindowSelfAttention,
    fuse_for_inference,
    load_checkpoint,
)
from mmhrformer.analysis.complexity import complexity
from mmhrformer.models.ablations.swin import SwinTransformer

pytestmark = pytest.mark.once
TINY = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 2, 1), num_blocks=1)
PLAIN = dict(type='mmhrformer.LocalWindowSelfAttention')
SHIFTED = dict(type='mmhrformer.ShiftedWindowSelfAttention')
WITHOUT_DW = dict(type='mmhrformer.FFN')
KINDS = {
    'no-dwconv': dict(ffn_cfg=WITHOUT_DW),
    'plain FFN': dict(ffn_cfg=dict(WITHOUT_DW, with_norm=False)),
    'shifted': dict(ffn_cfg=WITHOUT_DW, attn_cfg=[PLAIN, SHIFTED]),
    'shifted-dwconv': dict(attn_cfg=[PLAIN, SHIFTED]),
}
every_kind = pytest.mark.parametrize('options', KINDS.values(), ids=KINDS)


def make_backbone(**options) -> HRFormer:
    """A backbone whose normalizations have learned something."""
    model = HRFormer(**{'arch': TINY, 'window_size': 4, **options})
    golden.recipe.fill_module(model)
    return model.eval()


# ------------------------------------------------------------------ FFN


@pytest.mark.parametrize('training', [False, True])
def test_ffn_is_the_one_of_hrformer_without_the_convolution(training):
    """Equal to DWConvFFN with an identity convolution, except for its normalization and GELU."""
    torch.manual_seed(0)
    ffn = FFN(embed_dims=6, feedforward_channels=10).double().train(training)
    for parameter in ffn.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)

    def norm(y, layer):
        mean, var = layer.running_mean, layer.running_var
        if training:
            mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2), unbiased=False)
        return (y - mean) / (var + 1e-5).sqrt() * layer.weight + layer.bias

    y = F.gelu(norm(F.linear(x, ffn.fc1.weight[:, :, 0, 0], ffn.fc1.bias), ffn.norm1))
    y = F.gelu(norm(F.linear(y, ffn.fc2.weight[:, :, 0, 0], ffn.fc2.bias), ffn.norm3))
    torch.testing.assert_close(ffn(x), y)
    missing = set(DWConvFFN(6, 10).state_dict()) - set(ffn.state_dict())
    assert {key.split('.')[0] for key in missing} == {'dw3x3', 'norm2'}


def test_ffn_without_normalization_is_that_of_a_transformer():
    torch.manual_seed(0)
    ffn = FFN(embed_dims=6, feedforward_channels=10, with_norm=False).double()
    linear = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)).double()
    for conv, layer in ((ffn.fc1, linear[0]), (ffn.fc2, linear[2])):
        conv.load_state_dict(
            dict(weight=layer.weight.detach()[:, :, None, None], bias=layer.bias.detach())
        )
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    grads = []
    for module in (ffn, linear):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        (out * x).sum().backward()
        grads.append((out, leaf.grad))
    torch.testing.assert_close(*grads)
    assert set(ffn.state_dict()) == {'fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias'}


# ------------------------------------------------------------------ what connects windows


@pytest.mark.parametrize(
    ('options', 'connected'),
    [
        (dict(ffn_cfg=WITHOUT_DW), False),
        (dict(), True),
        (dict(ffn_cfg=WITHOUT_DW, attn_cfg=SHIFTED), True),
    ],
    ids=['nothing', 'depth-wise convolution', 'shifted windows'],
)
def test_what_connects_windows(options, connected):
    """A change in one window reaches the next through the convolution or through the shift."""
    torch.manual_seed(0)
    block = HRFormerBlock(embed_dims=8, num_heads=2, window_size=4, **options).double().eval()
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3, 3] = torch.randn(8, dtype=torch.float64)
    with torch.no_grad():
        difference = (block(changed) - block(x)).abs().amax(-1)[0]
    assert difference[:4, :4].max() > 1e-3
    assert (difference[4:].max() > 1e-6) == (difference[:, 4:].max() > 1e-6) == connected


# ------------------------------------------------------------------ the backbone


def test_attentions_take_turns_by_depth():
    model = HRFormer(arch=TINY, window_size=4, attn_cfg=[PLAIN, SHIFTED])
    for name, module in model.named_modules():
        if isinstance(module, LocalWindowSelfAttention):
            depth, _ = model.get_layer_depth(f'{name}.qkv.weight')  # the first block is layer 1
            assert isinstance(module, ShiftedWindowSelfAttention) == (depth % 2 == 0), name
    model = HRFormer(arch='tiny', attn_cfg=(PLAIN, SHIFTED))
    for name, block in model.named_modules():
        if isinstance(block, HRFormerBlock):  # two blocks a module: the second is shifted
            assert isinstance(block.attn, ShiftedWindowSelfAttention) == name.endswith('.1'), name


def test_configs_are_left_alone():
    cfgs = [dict(PLAIN), dict(SHIFTED, shift_size=1)]
    before = copy.deepcopy(cfgs)
    model = HRFormer(arch=TINY, attn_cfg=cfgs)
    assert cfgs == before
    assert {m.shift_size for m in model.modules() if hasattr(m, 'shift_size')} == {1}


def test_wrong_attentions_are_named():
    with pytest.raises(
        ValueError, match=r'attn_cfg=\[\]: expected one or more configs of attention'
    ):
        HRFormer(arch=TINY, attn_cfg=[])
    with pytest.raises(ValueError, match="attn_cfg='shifted': expected a config"):
        HRFormer(arch=TINY, attn_cfg='shifted')


@every_kind
def test_streams_and_layer_depths(options):
    model = make_backbone(**options, out_indices=(0, 2))
    with torch.no_grad():
        first, third = model(torch.rand(2, 3, 72, 100))
    assert first.shape == (2, 8, 18, 25)
    assert third.shape == (2, 24, 5, 7)
    depths = {model.get_layer_depth(name) for name, _ in model.named_parameters()}
    assert depths == {(depth, 6) for depth in range(5)}


@every_kind
def test_recomputing_changes_nothing(options):
    torch.manual_seed(0)
    models = [HRFormer(arch=TINY, window_size=4, with_cp=cp, **options) for cp in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.rand(2, 3, 64, 96)
    for model in models:
        sum(out.square().mean() for out in model(x)).backward()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    torch.testing.assert_close(*(dict(model.named_buffers()) for model in models))


@every_kind
def test_frozen_stages(options):
    model = HRFormer(arch=TINY, frozen_stages=3, **options).train()
    learning = {name.split('.')[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {'stage4'}
    assert not any(m.training for m in model.stage3.modules())


@every_kind
@pytest.mark.parametrize('size', [(64, 64), (97, 161)])
def test_folded_backbones_stay_equal(options, size):
    model = make_backbone(**options)
    fused = fuse_for_inference(model)
    image = golden.image((2, 3, *size))
    with torch.no_grad():
        for a, b in zip(model(image), fused(image)):
            assert (a - b).abs().max() < 1e-5 * a.abs().max()
    assert not any(isinstance(module, _BatchNorm) for module in fused.modules())


@every_kind
def test_checkpoints_load_with_another_window(options):
    trained = make_backbone(**options)
    model = HRFormer(arch=TINY, window_size=7, **options)
    report = load_checkpoint(model, dict(trained.state_dict()))
    assert (report.missing, report.unused) == ([], [])
    tables = [key for key in trained.state_dict() if key.endswith('bias_table')]
    assert sorted(report.resized) == sorted(tables)


def test_operations_of_the_ablations():
    """The convolution is what is missing; a shift costs no multiplication."""
    shape = (1, 3, 64, 64)
    counts = {kind: complexity(HRFormer(arch=TINY, **o), shape) for kind, o in KINDS.items()}
    full = complexity(HRFormer(arch=TINY), shape)
    assert counts['shifted-dwconv'] == full
    assert counts['shifted'] == counts['no-dwconv']
    model = HRFormer(arch=TINY)
    places = {8: 256, 16: 64, 24: 16, 32: 4}  # tokens of each stream
    convolutions = [m for m in model.modules() if isinstance(m, DWConvFFN)]
    macs = sum(9 * m.fc1.out_channels * places[m.fc2.out_channels] for m in convolutions)
    assert full['macs'] - counts['no-dwconv']['macs'] == macs


# ------------------------------------------------------------------ Swin Transformer


SWIN = dict(
    arch=dict(embed_dims=8, depths=(2, 2), num_heads=(1, 2)),
    window_size=4,
    out_indices=(0, 1),
    pad_small_map=True,
    drop_path_rate=0.0,
)


def test_swin_with_the_stock_ffn_is_the_stock_swin():
    """So that only the FFN differs."""
    from mmpretrain.models import SwinTransformer as Stock

    torch.manual_seed(0)
    stock = Stock(**SWIN)
    ours = SwinTransformer(**SWIN, ffn_cfg=dict(WITHOUT_DW, with_norm=False))
    stock.eval(), ours.eval()  # which return nothing in mmpretrain
    state = {}
    for key, tensor in stock.state_dict().items():
        new = key.replace('ffn.layers.0.0.', 'ffn.fc1.').replace('ffn.layers.1.', 'ffn.fc2.')
        state[new] = tensor[:, :, None, None] if new != key and tensor.ndim == 2 else tensor
    ours.load_state_dict(state)
    x = torch.rand(2, 3, 48, 68)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x))


def test_swin_with_the_ffn_of_hrformer():
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        models = [
            MODELS.build(dict(SWIN, type='mmhrformer.SwinTransformer', with_cp=cp))
            for cp in (False, True)
        ]
    models[1].load_state_dict(models[0].state_dict())
    blocks = [block for stage in models[0].stages for block in stage.blocks]
    assert all(isinstance(block.ffn, DWConvFFN) for block in blocks)
    assert [block.attn.shift_size for block in blocks] == [0, 2, 0, 2]
    x = torch.rand(2, 3, 48, 68)
    for model in models:
        sum(out.square().mean() for out in model(x)).backward()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    torch.testing.assert_close(*(dict(model.named_buffers()) for model in models))


def test_swin_drops_the_ffn_of_single_samples():
    torch.manual_seed(0)
    block = SwinTransformer(**{**SWIN, 'drop_path_rate': 0.5}).stages[1].blocks[-1].train()
    for parameter in block.attn.w_msa.proj.parameters():
        torch.nn.init.zeros_(parameter)  # what is left is the FFN
    x = torch.rand(32, 16, 16)
    change = (block(x, (4, 4)) - x).abs().amax((1, 2))
    assert 5 < (change == 0).sum() < 27


def test_swin_without_the_shift():
    model = SwinTransformer(**SWIN, stage_cfgs=dict(block_cfgs=dict(shift=False)))
    assert {m.shift_size for m in model.modules() if hasattr(m, 'shift_size')} == {0}

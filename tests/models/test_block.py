"""The blocks: residual sums, stochastic depth, recomputation, exchangeable parts."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmhrformer import MODELS, HRFormerBlock
from mmhrformer.models.block import Bottleneck


@MODELS.register_module(force=True)
class OnesForTest(BaseModule):
    """Stands for an attention or an FFN: says 1 (or ``value``) everywhere."""

    def __init__(self, embed_dims: int, value: float = 1.0, **options) -> None:
        super().__init__()
        self.options = options
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.value)


ONES = dict(type='mmhrformer.OnesForTest')


def make_block(**options) -> HRFormerBlock:
    torch.manual_seed(0)
    block = HRFormerBlock(embed_dims=8, num_heads=2, window_size=3, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block.double()


def make_map(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 5, 7, 8, generator=generator, dtype=torch.float64)


def test_block_is_two_residual_sums_of_normalized_maps():
    block, x = make_block().eval(), make_map()
    half = x + block.attn(nn.functional.layer_norm(x, (8,), *block.norm1.parameters(), eps=1e-6))
    norm = nn.functional.layer_norm(half, (8,), *block.norm2.parameters(), eps=1e-6)
    torch.testing.assert_close(block(x), half + block.ffn(norm))


@pytest.mark.parametrize(('mlp_ratio', 'hidden'), [(4, 32), (2.5, 20)])
def test_mlp_ratio_sets_the_hidden_channels(mlp_ratio, hidden):
    assert make_block(mlp_ratio=mlp_ratio).ffn.dw3x3.in_channels == hidden


def test_block_hands_its_options_to_the_attention():
    attn = make_block(with_rpe=False, pad_mask=True).attn
    assert attn.relative_position_bias_table is None
    assert attn.pad_mask
    assert (attn.num_heads, attn.window_size) == (2, 3)


def test_attention_and_ffn_of_the_user_can_be_plugged_in():
    block = make_block(attn_cfg=dict(value=2.0, **ONES), ffn_cfg=dict(value=0.5, **ONES))
    attn = dict(num_heads=2, window_size=3, with_rpe=True, pad_mask=False)
    assert block.attn.options == attn
    assert block.ffn.options == dict(feedforward_channels=32, norm_cfg=dict(type='BN'))
    x = make_map()
    torch.testing.assert_close(block(x), x + 2.5)


def test_configs_given_by_the_user_stay_as_they_were():
    options = dict(
        attn_cfg=dict(type='mmhrformer.LocalWindowSelfAttention'),
        ffn_cfg=dict(type='mmhrformer.DWConvFFN'),
        norm_cfg=dict(type='BN', requires_grad=True),
    )
    before = copy.deepcopy(options)
    make_block(**options)
    assert options == before


def test_drop_path_skips_branches_of_single_samples_and_rescales_the_others():
    rate = 0.75
    block = make_block(drop_path_rate=rate, attn_cfg=ONES, ffn_cfg=ONES).train()
    x = make_map(batch=400)
    added = block(x) - x
    torch.testing.assert_close(added.amax((1, 2, 3)), added.amin((1, 2, 3)))
    kept = (added[:, 0, 0, 0] * (1 - rate)).round(decimals=6)
    assert set(kept.tolist()) == {0.0, 1.0, 2.0}  # none, one or both branches of a sample
    # The two branches are drawn apart, and on average nothing changes.
    assert (kept == 2).double().mean() == pytest.approx((1 - rate) ** 2, abs=0.05)
    assert added.mean() == pytest.approx(2, abs=0.35)
    torch.testing.assert_close(block.eval()(x), x + 2)


def test_block_without_drop_path_has_an_identity():
    assert isinstance(make_block().drop_path, nn.Identity)


def step(block: HRFormerBlock, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a training step, and all its gradients and buffers afterwards."""
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    out = block(x)
    out.square().sum().backward()
    state = {name: p.grad for name, p in block.named_parameters()}
    state.update(block.named_buffers(), x=x.grad)
    return out, state


@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
@pytest.mark.parametrize('training', [True, False])
def test_recomputing_changes_neither_outputs_nor_gradients_nor_statistics(training, drop_path_rate):
    plain = make_block(drop_path_rate=drop_path_rate).train(training)
    cheap = make_block(drop_path_rate=drop_path_rate, with_cp=True).train(training)
    for _ in range(2):
        x = make_map(batch=6)
        out, state = step(plain, x)
        cheap_out, cheap_state = step(cheap, x)
        assert torch.equal(cheap_out, out)
        assert set(cheap_state) == set(state)
        for name, tensor in state.items():
            assert torch.equal(cheap_state[name], tensor), name
    assert cheap.ffn.norm1.num_batches_tracked == (2 if training else 0)
    norms = [m for m in cheap.modules() if isinstance(m, _BatchNorm)]
    assert all(norm.track_running_stats for norm in norms)


@pytest.mark.parametrize(
    'norm_cfg',
    [
        dict(type='BN', momentum=None),
        dict(type='BN', track_running_stats=False),
        dict(type='SyncBN'),
        dict(type='SyncBN', momentum=None),
        dict(type='IN', track_running_stats=True),
    ],
    ids=lambda cfg: ' '.join(map(str, cfg.values())),
)
def test_any_norm_can_be_computed_again(norm_cfg):
    states = []
    for with_cp in (False, True):
        block = make_block(norm_cfg=norm_cfg, with_cp=with_cp).train()
        states.append([step(block, make_map())[1] for _ in range(2)])
    torch.testing.assert_close(*states, rtol=0, atol=0)


def saved_bytes(block: HRFormerBlock, x: Tensor) -> int:
    """Tensors that a forward pass keeps for the backward pass, besides the parameters."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    for parameter in block.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def test_recomputing_keeps_only_the_input():
    x = make_map(batch=8).requires_grad_()
    assert saved_bytes(make_block(with_cp=True), x) <= x.nbytes + 64
    assert saved_bytes(make_block(), x) > 10 * x.nbytes


@pytest.mark.parametrize(('with_cp', 'passes'), [(True, 2), (False, 1)])
def test_recomputing_runs_the_block_twice(with_cp, passes):
    block, calls = make_block(with_cp=with_cp), []
    block.attn.register_forward_hook(lambda *args: calls.append(1))
    block(make_map()).sum().backward()
    assert len(calls) == passes


def test_recomputing_is_off_without_gradients():
    block, x = make_block(with_cp=True).eval(), make_map()
    with torch.no_grad():
        assert torch.equal(block(x), make_block().eval()(x))


@pytest.mark.parametrize('depthwise', [False, True])
def test_bottleneck_adds_its_input(depthwise):
    torch.manual_seed(0)
    block = Bottleneck(32, 8, depthwise=depthwise).eval()
    assert isinstance(block.downsample, nn.Identity)
    assert block.conv2.groups == (8 if depthwise else 1)
    nn.init.zeros_(block.bn3.weight)
    x = torch.randn(2, 32, 5, 7)
    torch.testing.assert_close(block(x), x.relu())


def test_bottleneck_projects_its_input_when_channels_change():
    torch.manual_seed(0)
    block = Bottleneck(6, 8).eval()
    nn.init.zeros_(block.bn3.weight)
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(block(x), block.downsample(x).relu())
    assert block(x).shape == (2, 32, 5, 7)

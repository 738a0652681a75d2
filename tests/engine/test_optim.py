"""Two parameter groups, and refusals; the official groups are checked with the recipes."""

from __future__ import annotations

import copy
import inspect
from importlib import import_module

import pytest
import torch
from graphs import Graphs
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, OPTIMIZERS, DefaultScope, Registry
from needs import needs
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrize import register_parametrization

from mmhrformer import HRFormer, LocalWindowSelfAttention
from mmhrformer.checkpoints.contents import plain_name
from mmhrformer.engine import DecayGroupsConstructor

OPTIMIZER = dict(type='AdamW', lr=1e-3, weight_decay=0.05)


def build(model: nn.Module, paramwise: dict | None = None, **options):
    config = dict(constructor='mmhrformer.DecayGroupsConstructor', optimizer=OPTIMIZER, **options)
    if paramwise is not None:
        config['paramwise_cfg'] = paramwise
    return build_optim_wrapper(model, config)


@pytest.mark.parametrize(
    ('rules', 'sizes'),
    [
        (None, [3]),
        ([], [3]),
        (['vectors'], [1, 2]),
        (['bias_tables'], [3]),
        (['vectors', 'bias_tables'], [1, 2]),
    ],
)
def test_groups(rules, sizes):
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    groups = build(model, None if rules is None else dict(no_decay=rules)).optimizer.param_groups
    assert [len(group['params']) for group in groups] == sizes
    assert [group['weight_decay'] for group in groups] == [0.05, 0.0][: len(sizes)]
    assert {group['lr'] for group in groups} == {1e-3}


def test_bias_tables_can_be_spared_alone():
    model = HRFormer(arch='tiny')
    decayed, spared = build(model, dict(no_decay=['bias_tables'])).optimizer.param_groups
    tables = [p for name, p in model.named_parameters() if name.endswith('bias_table')]
    assert {id(p) for p in spared['params']} == {id(p) for p in tables}
    assert len(decayed['params']) + len(tables) == len(list(model.parameters()))


def test_parametrized_bias_tables_are_spared():
    attention = LocalWindowSelfAttention(8, 2)
    register_parametrization(attention, 'relative_position_bias_table', nn.Identity())
    _, spared = build(attention, dict(no_decay=['bias_tables'])).optimizer.param_groups
    table = attention.parametrizations.relative_position_bias_table.original
    assert [id(p) for p in spared['params']] == [id(table)]


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (group,) = build(model).optimizer.param_groups
    assert [id(p) for p in group['params']] == [id(p) for p in model[1].parameters()]


def test_options_of_the_wrapper_are_kept():
    wrapper = build(nn.Linear(2, 2), clip_grad=dict(max_norm=5.0), accumulative_counts=3)
    assert wrapper.clip_grad_kwargs == dict(max_norm=5.0)
    assert wrapper._accumulative_counts == 3


def test_one_step_is_that_of_mmengine_s_own_constructor():
    """The grouping changes nothing but the speed."""
    steps = []
    for constructor in ('mmhrformer.DecayGroupsConstructor', 'DefaultOptimWrapperConstructor'):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        ours = constructor.startswith('mmhrformer')
        paramwise = dict(no_decay=['vectors']) if ours else dict(flat_decay_mult=0.0)
        options = dict(constructor=constructor, optimizer=OPTIMIZER, paramwise_cfg=paramwise)
        wrapper = build_optim_wrapper(model, options)
        for _ in range(3):
            wrapper.update_params(model(torch.ones(2, 3, 8, 8)).square().mean())
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*steps)


@pytest.mark.parametrize(
    ('paramwise', 'message'),
    [
        (dict(norm_decay_mult=0.0), 'no option norm_decay_mult, only no_decay and layer'),
        (
            dict(no_decay=['norms']),
            r"no_decay=\['norms'\]: choose from \['vectors', 'bias_tables'\]",
        ),
    ],
)
def test_unknown_rules_are_refused(paramwise, message):
    with pytest.raises(ValueError, match=message):
        DecayGroupsConstructor(dict(optimizer=OPTIMIZER), paramwise)


MICRO = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 2, 1), num_blocks=2)
BACKBONE = dict(type='mmhrformer.HRFormer', arch=MICRO)
STREAMS = dict(in_channels=MICRO['channels'], in_index=(0, 1, 2, 3), channels=8, num_classes=3)
HEAD = dict(input_transform='resize_concat', **STREAMS)
MODELS_OF = {
    'mmpretrain': dict(
        type='ImageClassifier',
        backbone=BACKBONE,
        neck=dict(type='mmhrformer.HRFormerFusion', in_channels=MICRO['channels']),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=2048),
    ),
    'mmpose': dict(
        type='TopdownPoseEstimator',
        backbone=dict(BACKBONE, out_indices=(0,)),
        head=dict(
            type='HeatmapHead',
            in_channels=8,
            out_channels=17,
            deconv_out_channels=None,
            decoder=dict(type='MSRAHeatmap', input_size=(64, 64), heatmap_size=(16, 16), sigma=2),
        ),
    ),
    'mmseg': dict(
        type='CascadeEncoderDecoder',
        num_stages=2,
        backbone=BACKBONE,
        decode_head=[
            dict(type='mmhrformer.OCRAuxHead', **HEAD),
            dict(type='mmhrformer.OCRHead', ocr_channels=8, **HEAD),
        ],
    ),
}


def build_model(framework: str) -> nn.Module:
    import_module(f'{framework}.models')
    with DefaultScope.overwrite_default_scope(framework):
        return MODELS.build(copy.deepcopy(MODELS_OF[framework]))


def by_name(model: nn.Module, wrapper, key: str) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = wrapper.optimizer.param_groups
    return {names[id(p)]: group[key] for group in groups for p in group['params']}


@pytest.mark.parametrize('framework', [pytest.param(name, marks=needs(name)) for name in MODELS_OF])
def test_rates_of_layers(framework):
    model = build_model(framework)
    model.backbone.conv1.requires_grad_(False)
    paramwise = dict(no_decay=['vectors'], layer_decay_rate=0.8)
    wrapper = build(model, paramwise)
    rates = by_name(model, wrapper, 'lr')
    assert rates.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        depth, layers = model.backbone.get_layer_depth(name, 'backbone.')
        assert rate == pytest.approx(1e-3 * 0.8 ** (layers - 1 - depth))
        if not name.startswith('backbone.'):
            assert rate == 1e-3
    assert len(set(rates.values())) == 10
    groups = wrapper.optimizer.param_groups
    assert len(groups) == 2 * len(set(rates.values()))
    assert groups[0]['lr'] == 1e-3  # what the log shows
    plain = build(model, dict(no_decay=['vectors']))
    decay = [by_name(model, one, 'weight_decay') for one in (wrapper, plain)]
    assert decay[0] == decay[1]


@needs('mmpretrain')
def test_rates_of_layers_are_those_of_mmpretrain():
    import_module('mmpretrain.engine')
    model = build_model('mmpretrain')
    stock = dict(
        constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
        optimizer=OPTIMIZER,
        paramwise_cfg=dict(layer_decay_rate=0.7, flat_decay_mult=0.0),
    )
    theirs = build_optim_wrapper(model, stock)
    ours = build(model, dict(no_decay=['vectors'], layer_decay_rate=0.7))
    for key in ('lr', 'weight_decay'):
        assert by_name(model, ours, key) == pytest.approx(by_name(model, theirs, key))


def test_rates_of_layers_of_a_backbone_alone():
    model = HRFormer(MICRO)
    rates = by_name(model, build(model, dict(layer_decay_rate=0.5)), 'lr')
    assert rates['conv1.weight'] == 1e-3 * 0.5**9
    assert build(model, dict(layer_decay_rate=1.0)).optimizer.param_groups[0]['lr'] == 1e-3


def test_rates_of_layers_do_not_depend_on_wrappers():
    """Wrappers such as torch.compile and activation checkpointing rename parameters."""
    plain = HRFormer(MICRO)
    wrapped = copy.deepcopy(plain)
    wrapped.stage2[0] = checkpoint_wrapper(wrapped.stage2[0])
    wrapped.stage4 = torch.compile(wrapped.stage4)
    models = plain, nn.ModuleDict(dict(backbone=torch.compile(wrapped)))
    models = *models, torch.compile(nn.ModuleDict(dict(backbone=wrapped)))
    rates = [by_name(m, build(m, dict(layer_decay_rate=0.5)), 'lr') for m in models]
    for found in rates[1:]:
        found = {plain_name(name).removeprefix('backbone.'): lr for name, lr in found.items()}
        assert found == rates[0]


def test_added_modules_have_the_full_rate():
    model = HRFormer(MICRO)
    model.adapter = nn.Linear(2, 2)
    assert by_name(model, build(model, dict(layer_decay_rate=0.5)), 'lr')['adapter.bias'] == 1e-3


@pytest.mark.parametrize('model', [nn.Linear(2, 2), nn.ModuleDict(dict(backbone=nn.Linear(2, 2)))])
def test_rates_of_layers_need_a_backbone_that_has_some(model):
    with pytest.raises(ValueError, match='layer_decay_rate: Linear has no get_layer_depth'):
        build(model, dict(layer_decay_rate=0.5))


@pytest.mark.parametrize('rate', [0, -1, 1.5, '0.5', None])
def test_impossible_rates_of_layers_are_refused(rate):
    with pytest.raises(ValueError, match=f'layer_decay_rate={rate!r}: expected'):
        build(nn.Linear(2, 2), dict(layer_decay_rate=rate))


@pytest.mark.parametrize(
    ('optimizer', 'fused'),
    [
        (dict(type='AdamW'), True),
        (dict(type=torch.optim.AdamW), True),
        (dict(type='AdamW', fused=False), False),
        (dict(type='AdamW', foreach=True), False),
        (
            dict(type='Adagrad', lr_decay=0),
            'fused' in inspect.signature(torch.optim.Adagrad).parameters,
        ),
        (dict(type='Rprop'), False),
    ],
    ids=str,
)
def test_fused_on_gpus_where_it_can_be(optimizer, fused, monkeypatch):
    monkeypatch.setattr(torch.nn.Parameter, 'is_cuda', True)
    given = {}
    monkeypatch.setattr(
        OPTIMIZERS,
        'build',
        lambda cfg: given.update(cfg) or OPTIMIZERS.get('SGD')(cfg['params'], 1.0),
    )
    DecayGroupsConstructor(dict(optimizer=dict(optimizer, lr=1e-3)))(nn.Linear(2, 2))
    assert given.get('fused', False) is fused


def test_compiled_steps_leave_the_optimizer_out():
    """`compile=True` compiles `train_step`, which would take in what AdamW does to each tensor."""
    model = nn.Linear(3, 2)
    wrapper = build(model)
    graphs = Graphs()
    before = model.weight.detach().clone()
    step = torch.compile(lambda x: wrapper.update_params(model(x).sum()), backend=graphs)
    step(torch.ones(4, 3))
    operators = [n for graph in graphs for n in graph.graph.nodes if n.op.startswith('call')]
    assert 0 < len(operators) < 4
    assert not torch.equal(model.weight, before)


OWN_OPTIMIZERS = Registry('own optimizer', parent=OPTIMIZERS, scope='own')


@OWN_OPTIMIZERS.register_module()
class NamedOtherwise(torch.optim.SGD):
    """An optimizer whose first argument has a name of its own."""

    def __init__(self, model_params: list, lr: float) -> None:
        super().__init__(model_params, lr=lr)


def test_the_first_argument_of_an_optimizer_may_have_any_name():
    cfg = dict(optimizer=dict(type='NamedOtherwise', lr=0.1))
    with DefaultScope.overwrite_default_scope('own'):
        wrapper = DecayGroupsConstructor(cfg, dict(no_decay='vectors'))(nn.Linear(2, 3))
    assert [group['weight_decay'] for group in wrapper.optimizer.param_groups] == [0, 0]
    assert [group['lr'] for group in wrapper.optimizer.param_groups] == [0.1, 0.1]


def test_other_than_dicts_and_models_without_parameters_are_refused():
    with pytest.raises(TypeError, match=r"paramwise_cfg=\['error'\]: expected a dict"):
        DecayGroupsConstructor(dict(optimizer=OPTIMIZER), ['error'])
    build = DecayGroupsConstructor(dict(optimizer=OPTIMIZER), dict(no_decay=['vectors']))
    with pytest.raises(ValueError, match='Linear has no trainable parameter'):
        build(nn.Linear(2, 3).requires_grad_(False))

"""Two parameter groups, and refusals; the official groups are checked with the recipes."""

from __future__ import annotations

import pytest
import torch
from graphs import Graphs
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmhrformer import HRFormer
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
        (dict(norm_decay_mult=0.0), 'no option norm_decay_mult, only no_decay'),
        (
            dict(no_decay=['norms']),
            r"no_decay=\['norms'\]: choose from \['vectors', 'bias_tables'\]",
        ),
    ],
)
def test_unknown_rules_are_refused(paramwise, message):
    with pytest.raises(ValueError, match=message):
        DecayGroupsConstructor(dict(optimizer=OPTIMIZER), paramwise)


def test_fused_only_where_it_can_be():
    def can_be_fused(**optimizer):
        return DecayGroupsConstructor(dict(optimizer=optimizer))._can_be_fused()

    assert can_be_fused(type='AdamW', lr=1e-3)
    assert can_be_fused(type=torch.optim.AdamW, lr=1e-3)
    assert not can_be_fused(type='AdamW', lr=1e-3, fused=False)
    assert not can_be_fused(type='AdamW', lr=1e-3, foreach=True)
    assert not can_be_fused(type='LBFGS')


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

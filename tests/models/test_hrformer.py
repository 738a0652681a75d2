"""The backbone: streams, options, initialization; refusals are in test_bad_input.py."""

from __future__ import annotations

import copy
import importlib
import logging
import pickle
from functools import cache

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmhrformer import (
    MODELS,
    HRFormer,
    HRFormerBlock,
    LocalWindowSelfAttention,
    fuse_for_inference,
)
from mmhrformer.checkpoints import convert
from mmhrformer.models.hr_module import HRModule

TINY = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
COUNTS = golden.read_json('params_flops.json')['parameters']


@cache
def weights(*entries: tuple) -> dict[str, Tensor]:
    """Random parameters and statistics, which depend on their names; not to be changed."""
    return golden.recipe.make_torch_state_dict(entries)


def make_model(**options) -> HRFormer:
    """A small model with random parameters and statistics."""
    model = HRFormer(**{'arch': TINY, **options})
    own = model.state_dict()
    entries = ((key, tuple(tensor.shape), str(tensor.dtype)) for key, tensor in own.items())
    for key, tensor in weights(*entries).items():
        own[key].copy_(tensor)
    return model


def empty(**options) -> HRFormer:
    """A model without numbers, which takes no memory and little time."""
    with torch.device('meta'):
        return HRFormer(**options)


def image(height: int = 64, width: int = 64, batch: int = 2) -> Tensor:
    return golden.image((batch, 3, height, width))


def run(model: HRFormer, x: Tensor) -> tuple[Tensor, ...]:
    """Output in evaluation mode."""
    with torch.no_grad():
        return model.eval()(x)


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)


def differ(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all((one - other).abs().max() > 1e-2 for one, other in zip(ours, theirs))


def blocks(model: nn.Module) -> dict[str, HRFormerBlock]:
    return {name: m for name, m in model.named_modules() if isinstance(m, HRFormerBlock)}


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Outputs


@pytest.mark.parametrize('upsample', ['nearest', 'bilinear'])
def test_any_size_gives_streams_at_a_quarter_to_a_thirty_second(upsample):
    model = make_model(upsample=upsample)
    for size in ((32, 32), (33, 65), (63, 32), (64, 96), (97, 161), (200, 136)):
        xs = run(model, image(*size, batch=1))
        assert isinstance(xs, tuple)
        expected = [
            (1, TINY['channels'][i], *(-(-side // 2 ** (i + 2)) for side in size)) for i in range(4)
        ]
        assert [tuple(x.shape) for x in xs] == expected
        assert all(x.isfinite().all() for x in xs), size


def test_samples_of_a_batch_do_not_influence_each_other():
    model, x = make_model(), image(65, 97, batch=3)
    together = run(model, x)
    alone = run(model, x[1:2])
    assert_same(alone, tuple(out[1:2] for out in together))


def test_images_need_not_have_three_channels():
    model = HRFormer(arch=TINY, in_channels=5)
    assert model.conv1.weight.shape == (64, 5, 3, 3)
    assert len(run(model, torch.rand(1, 5, 32, 32))) == 4


def test_out_indices_select_streams_of_the_same_model():
    full, x = make_model(), image(65, 97)
    outs = run(full, x)
    for out_indices in ((0,), (1,), (2,), (3,), (1, 3), (3, 0), [0, 1, 2, 3]):
        part = HRFormer(arch=TINY, out_indices=out_indices)
        missing, _ = part.load_state_dict(full.state_dict(), strict=False)
        assert not missing
        assert_same(run(part, x), tuple(outs[i] for i in out_indices))


def test_out_indices_may_be_given_as_in_stock_backbones():
    outs = run(make_model(), image())
    for given, expected in (
        (3, (3,)),
        (-1, (3,)),
        (np.int64(2), (2,)),
        ((-1,), (3,)),
        ([-4, -1], (0, 3)),
        (range(2), (0, 1)),
        (np.arange(4), (0, 1, 2, 3)),
        (torch.tensor([1, 2]), (1, 2)),
    ):
        model = make_model(out_indices=given)
        assert model.out_indices == expected
        assert all(type(index) is int for index in model.out_indices)
        assert_same(run(model, image()), tuple(outs[i] for i in expected))


@pytest.mark.parametrize('out_indices', [(0,), (2,), (1, 3), (0, 1, 2, 3)])
def test_every_parameter_gets_a_gradient(out_indices):
    model = make_model(out_indices=out_indices).train()
    sum(x.square().sum() for x in model(image())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_upsampling_changes_the_outputs():
    nearest, bilinear = (run(make_model(upsample=u), image()) for u in ('nearest', 'bilinear'))
    assert differ(nearest[:3], bilinear[:3])


@pytest.mark.parametrize(('upsample', 'corners'), [('nearest', True), ('bilinear', False)])
def test_enlarged_streams_are_fitted_to_odd_sizes(upsample, corners):
    """The official codes align the corners of what was enlarged by nearest, only."""
    streams = [nn.Identity(), nn.Identity()]
    module = HRModule(streams, (2, 2), (0,), upsample, dict(type='BN')).eval()
    fine, coarse = golden.image((1, 2, 5, 9)), golden.image((1, 2, 3, 5), seed=1)
    part = F.interpolate(module.fuse_layers[0][1](coarse), scale_factor=2, mode=upsample)
    part = F.interpolate(part, size=(5, 9), mode='bilinear', align_corners=corners)
    torch.testing.assert_close(module([fine, coarse])[0], (fine + part).relu())


def test_masked_padding_matters_where_windows_are_incomplete_only():
    masked, plain = (make_model(window_size=2, pad_mask=mask) for mask in (True, False))
    x = image(64, 128)
    assert_same(run(masked, x), run(plain, x))
    x = image(64, 96)  # 2 x 3 tokens in the coarsest stream
    assert differ(run(masked, x), run(plain, x))


def test_model_without_position_bias_is_one_whose_bias_is_zero():
    model, without = make_model(), HRFormer(arch=TINY, with_rpe=False)
    assert not [key for key in without.state_dict() if 'relative_position' in key]
    with_bias = run(model, image())
    for block in blocks(model).values():
        nn.init.zeros_(block.attn.relative_position_bias_table)
    without.load_state_dict(model.state_dict())
    assert_same(run(without, image()), run(model, image()))
    assert differ(run(without, image()), with_bias)


def test_recomputing_blocks_changes_no_gradient():
    x, grads = image(), []
    for with_cp in (False, True):
        model = make_model(with_cp=with_cp, drop_path_rate=0.5).train()
        torch.manual_seed(0)
        sum(x.mean() for x in model(x)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        assert all(block.with_cp == with_cp for block in blocks(model).values())
    torch.testing.assert_close(grads[0], grads[1])


# Architecture


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_parameters_are_as_many_as_the_official_ones(arch):
    four_streams = empty(arch=arch)
    assert count_parameters(four_streams) == COUNTS[f'cls {arch}']['backbone_four_branches']
    # The pose model: what only the coarser streams need is not there.
    last = four_streams.stage4[-1].fuse_layers
    unneeded = sum(count_parameters(layer) for layer in last[1:])
    expected = COUNTS[f'pose {arch}']['backbone_single_output']
    assert count_parameters(four_streams) - unneeded == expected
    assert count_parameters(empty(arch=arch, out_indices=(0,))) == expected


@pytest.mark.parametrize('window', [13, 15])
def test_larger_windows_have_as_many_parameters_as_the_official_ones(window):
    expected = COUNTS[f'seg base w{window} 19cls']['backbone']
    assert count_parameters(empty(arch='base', window_size=window)) == expected


def test_keys_and_shapes_are_the_official_ones_after_translation():
    official = {
        key: torch.empty(shape, device='meta')
        for key, shape, _ in golden.recipe.load_keys(golden.DATA / 'keys_cls_small.json')
    }
    converted, _ = convert(official)
    expected = {
        key.removeprefix('backbone.'): tensor.shape
        for key, tensor in converted.items()
        if key.startswith('backbone.')
    }
    ours = {key: tensor.shape for key, tensor in empty(arch='small').state_dict().items()}
    assert ours == expected


def test_each_stream_can_have_its_own_window():
    model = make_model(window_size=[2, 3, 4, 5])
    for name, block in blocks(model).items():
        stream = int(name.split('.')[3])  # stage2.0.branches.<stream>.0
        assert block.attn.window_size == stream + 2
        assert len(block.attn.relative_position_bias_table) == (2 * stream + 3) ** 2
    assert len(run(model, image(33, 65))) == 4


@pytest.mark.parametrize(('arch', 'depth'), [('tiny', 12), ('small', 14)])
def test_drop_path_rises_linearly_over_the_blocks(arch, depth):
    model = empty(arch=arch, drop_path_rate=0.3)
    rates = []
    for stage in (model.stage2, model.stage3, model.stage4):
        for module in stage:
            for parallel in zip(*module.branches):
                paths = [block.drop_path for block in parallel]
                rate = {getattr(path, 'drop_prob', 0.0) for path in paths}
                assert len(rate) == 1
                rates.append(rate.pop())
    assert rates == pytest.approx([0.3 * i / (depth - 1) for i in range(depth)])
    first = [module[0].drop_path for module in model.stage2[0].branches]
    assert all(isinstance(path, nn.Identity) for path in first)


def test_attention_and_ffn_of_the_blocks_are_configurable():
    attn_cfg = dict(type='mmhrformer.NoAttentionForTest', factor=2)
    model = HRFormer(arch=TINY, window_size=(1, 2, 3, 4), attn_cfg=attn_cfg, pad_mask=True)
    given = [block.attn.options for block in blocks(model).values()]
    assert [options['window_size'] for options in given][-4:] == [1, 2, 3, 4]
    assert all(options['factor'] == 2 and options['pad_mask'] for options in given)
    assert len(run(model, image())) == 4


@MODELS.register_module(force=True)
class NoAttentionForTest(BaseModule):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ('norm_cfg', 'norm'),
    [
        (dict(type='BN', momentum=0.01, eps=1e-3), nn.BatchNorm2d),
        (dict(type='SyncBN', requires_grad=True), nn.SyncBatchNorm),
        (dict(type='GN', num_groups=2), nn.GroupNorm),
    ],
)
def test_all_norms_but_those_of_tokens_follow_norm_cfg(norm_cfg, norm):
    model = make_model(norm_cfg=norm_cfg).train()
    norms = [m for m in model.modules() if isinstance(m, (_BatchNorm, nn.GroupNorm))]
    assert all(isinstance(m, norm) for m in norms)
    assert len(norms) == len([m for m in make_model().modules() if isinstance(m, nn.BatchNorm2d)])
    assert all(m.eps == norm_cfg.get('eps', 1e-5) for m in norms)
    sum(x.sum() for x in model(image())).backward()


def test_synchronized_norm_computes_what_the_plain_one_does():
    assert_same(run(make_model(norm_cfg=dict(type='SyncBN')), image()), run(make_model(), image()))


@pytest.mark.parametrize('out_indices', [(0,), (0, 1, 2, 3)])
def test_copies_and_pickles_compute_the_same(out_indices):
    model = make_model(out_indices=out_indices)
    expected = run(model, image())
    assert_same(run(copy.deepcopy(model), image()), expected)
    assert_same(run(pickle.loads(pickle.dumps(model)), image()), expected)


@pytest.mark.parametrize('fold', [False, True])
def test_replicas_of_data_parallel_compute_the_same(fold, monkeypatch):
    def broadcast(tensors, devices, detach=False):  # torch's works on GPUs only
        return [[tensor * 1 for tensor in tensors] for _ in devices]

    module = importlib.import_module('torch.nn.parallel.replicate')
    monkeypatch.setattr(module, '_broadcast_coalesced_reshape', broadcast)
    model, x = make_model().eval(), image()
    model = fuse_for_inference(model) if fold else model
    for replica in module.replicate(model, [0, 1]):
        assert_same(replica(x), model(x))


def test_arguments_are_not_changed():
    options = dict(
        arch={key: list(v) if isinstance(v, tuple) else v for key, v in TINY.items()},
        window_size=[7, 7, 5, 3],
        attn_cfg=dict(type='mmhrformer.LocalWindowSelfAttention'),
        ffn_cfg=dict(type='mmhrformer.DWConvFFN'),
        out_indices=[0, 2],
        norm_cfg=dict(type='BN', requires_grad=True),
        init_cfg=[dict(type='Normal', layer='Conv2d', std=0.001)],
    )
    before = copy.deepcopy(options)
    model = HRFormer(**options)
    model.init_weights()
    run(model, image())
    assert options == before


# Frozen stages

STAGES = [
    ('conv1.', 'bn1.', 'conv2.', 'bn2.'),
    ('layer1.', 'transition1.'),
    ('stage2.', 'transition2.'),
    ('stage3.', 'transition3.'),
    ('stage4.',),
]


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 3, 4])
def test_frozen_stages_do_not_learn(frozen_stages):
    model = make_model(frozen_stages=frozen_stages, drop_path_rate=0.1)
    assert model.eval().train() is model
    frozen = tuple(prefix for stage in STAGES[: frozen_stages + 1] for prefix in stage)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    for name, module in model.named_modules():
        if '.' in name or name in ('conv1', 'bn1', 'conv2', 'bn2'):
            assert module.training != f'{name}.'.startswith(frozen), name
    before = copy.deepcopy(dict(model.named_buffers()))
    model(image())
    for name, buffer in model.named_buffers():
        if 'running' in name:
            assert torch.equal(buffer, before[name]) == name.startswith(frozen), name


def test_frozen_stages_stay_frozen_after_initialization():
    model = HRFormer(arch=TINY, frozen_stages=2)
    model.init_weights()
    assert not model.stage2[0].branches[0][0].attn.qkv.weight.requires_grad


@pytest.mark.parametrize('norm_eval', [True, False])
def test_norm_eval_keeps_statistics_but_lets_the_rest_train(norm_eval):
    model = make_model(norm_eval=norm_eval, drop_path_rate=0.1)
    assert model.train() is model
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert all(m.training != norm_eval for m in norms)
    assert all(m.weight.requires_grad for m in norms)
    assert all(block.drop_path.training for block in blocks(model).values())
    before = model.bn1.running_mean.clone()
    model(image())
    assert torch.equal(model.bn1.running_mean, before) == norm_eval


def test_train_and_eval_return_the_model():
    model = make_model(frozen_stages=1, norm_eval=True)
    assert model.train() is model
    assert model.eval() is model
    assert not any(m.training for m in model.modules())


# Initialization


def test_bias_tables_start_small_and_stay_so_through_init_weights():
    torch.manual_seed(0)
    model = HRFormer(arch=TINY)
    model.init_weights()
    for name, block in blocks(model).items():
        std = block.attn.relative_position_bias_table.std().item()
        assert std == pytest.approx(0.02, rel=0.25), name


def test_init_cfg_reaches_every_convolution():
    torch.manual_seed(0)
    model = HRFormer(arch=TINY, init_cfg=dict(type='Normal', layer='Conv2d', std=0.001))
    model.init_weights()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(0 < m.weight.std() < 0.002 for m in convs)
    assert model.stage4[0].branches[3][0].attn.qkv.weight.std() > 0.01


def test_init_weights_reaches_every_child():
    attn_cfg = dict(
        type='mmhrformer.LocalWindowSelfAttention',
        init_cfg=dict(type='Constant', layer='Linear', val=0.5),
    )
    model = HRFormer(arch=TINY, attn_cfg=attn_cfg)
    model.init_weights()
    attentions = [m for m in model.modules() if isinstance(m, LocalWindowSelfAttention)]
    assert len(attentions) == 2 + 3 + 4
    assert all((m.qkv.weight == 0.5).all() for m in attentions)


@pytest.fixture
def messages():
    """Messages logged during a test."""
    logger, handler, seen = MMLogger.get_current_instance(), logging.Handler(logging.INFO), []
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def test_pretrained_takes_our_own_checkpoints(tmp_path):
    model = make_model()
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, tmp_path / 'ours.pth')
    other = HRFormer(
        arch=TINY, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'ours.pth'))
    )
    other.init_weights()
    assert_same(run(other, image()), run(model, image()))


def test_pretrained_takes_official_imagenet_checkpoints_and_names_what_is_not_used(
    tmp_path, messages
):
    """As in the pose configs: with one stream, the exchange of the others is unused."""
    checkpoint = golden.official_checkpoint('cls', 'keys_cls_tiny.json')
    torch.save(checkpoint, tmp_path / 'hrt_tiny.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'hrt_tiny.pth'))
    model = HRFormer(arch='tiny', window_size=(7, 7, 7, 5), out_indices=(0,), init_cfg=init_cfg)
    model.init_weights()
    official = checkpoint['model']
    assert torch.equal(model.conv1.weight, official['conv1.weight'])
    block = 'stage4.1.branches.3.1'
    qkv = [official[f'{block}.attn.attn.{name}_proj.weight'] for name in 'qkv']
    ours = model.get_submodule(block)
    assert torch.equal(ours.attn.qkv.weight, torch.cat(qkv))
    assert torch.equal(ours.ffn.dw3x3.bias, official[f'{block}.mlp.dw3x3.bias'])
    assert ours.attn.relative_position_bias_table.shape == (81, 8)
    said = '\n'.join(messages)
    for unused in ('classifier.weight', 'incre_modules.0.0.conv1', 'stage4.1.fuse_layers.1.0.0'):
        assert unused in said
    assert 'missing' not in said
    assert '[7]' in said  # the windows of the resized tables, before
    assert '[5, 7]' in said  # and now


def test_pretrained_refuses_the_checkpoint_of_another_model(tmp_path):
    torch.save({'state_dict': {'conv1.weight': torch.zeros(64, 3, 7, 7)}}, tmp_path / 'resnet.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'resnet.pth'))
    with pytest.raises(ValueError, match='not an HRFormer checkpoint in a known format'):
        HRFormer(arch=TINY, init_cfg=init_cfg).init_weights()


# Layer-wise learning rates


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_layer_depth_grows_along_the_network(prefix):
    arch = {**TINY, 'num_modules': (1, 3, 2), 'num_blocks': 2}
    model = HRFormer(arch=arch)
    names = [name for name, _ in model.named_parameters()]
    depth = {name: model.get_layer_depth(prefix + name, prefix) for name in names}
    num_layers = 14  # the stem, 6 modules of 2 blocks, the head
    assert {of for _, of in depth.values()} == {num_layers}
    assert {layer for layer, _ in depth.values()} == set(range(num_layers - 1))
    layer = {name: layer for name, (layer, _) in depth.items()}
    order = [
        f'stage{stage}.{module}.branches.0.{block}.norm1.weight'
        for stage, modules in zip((2, 3, 4), arch['num_modules'])
        for module in range(modules)
        for block in range(2)
    ]
    assert [layer[name] for name in order] == list(range(1, num_layers - 1))
    for name in names:
        if name.startswith(('conv', 'bn', 'layer1', 'transition1')):
            assert layer[name] == 0, name
        if '.branches.' in name:  # parallel streams are alike
            parts = name.split('.')
            assert layer[name] == layer['.'.join([*parts[:3], '0', parts[4], 'norm1.weight'])]
    assert layer['transition2.2.0.0.weight'] == layer['stage3.0.branches.0.0.norm1.weight']
    added = prefix + 'adapter.weight'
    assert model.get_layer_depth(added, prefix) == (num_layers - 1, num_layers)
    assert layer['transition3.3.0.0.weight'] == layer['stage4.0.branches.0.0.norm1.weight']
    assert layer['stage3.1.fuse_layers.0.1.0.weight'] == layer[order[5]]
    if prefix:
        assert model.get_layer_depth('head.fc.weight', prefix) == (num_layers - 1, num_layers)


def test_layer_wise_learning_rates_of_mmpretrain():
    import mmpretrain.engine  # noqa: F401

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(
            dict(
                type='mmpretrain.ImageClassifier',
                backbone=dict(type='mmhrformer.HRFormer', arch=TINY),
                neck=dict(type='mmhrformer.HRFormerFusion', in_channels=TINY['channels']),
                head=dict(type='LinearClsHead', num_classes=3, in_channels=2048),
            )
        )
        wrapper = build_optim_wrapper(
            model,
            dict(
                constructor='LearningRateDecayOptimWrapperConstructor',
                optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
                paramwise_cfg=dict(layer_decay_rate=0.5),
            ),
        )
    rates = {group['param_name']: group['lr'] for group in wrapper.optimizer.param_groups}
    assert len(rates) == len(list(model.parameters()))
    assert rates['head.fc.weight'] == 1
    assert rates['neck.final_layer.0.weight'] == 1
    assert rates['backbone.stage4.0.branches.3.0.ffn.fc1.weight'] == 0.5
    assert rates['backbone.stage3.0.branches.0.0.ffn.fc1.weight'] == 0.25
    assert rates['backbone.stage2.0.branches.0.0.ffn.fc1.weight'] == 0.125
    assert rates['backbone.conv1.weight'] == 0.0625

"""The names of tensors in the world's checkpoints, and what they become."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path

import golden
import pytest
import torch
from mmengine.config import Config
from needs import may_need, needs
from torch import Tensor

from mmhrformer import HRFormer
from mmhrformer.checkpoints import convert, detect_dialect, resize_bias_table, unwrap
from mmhrformer.checkpoints.dialects import check_finite

TINY = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
CLS_HEAD = ('incre_modules.', 'downsamp_modules.', 'final_layer.', 'classifier.')
MMPOSE_CONFIG = (
    '.mim/configs/body_2d_keypoint/topdown_heatmap/coco'
    '/td-hm_hrformer-small_8xb32-210e_coco-256x192.py'
)

pytestmark = [
    pytest.mark.filterwarnings('ignore:``build_loss`` would'),
    may_need('mmpose', 'mmseg'),
]


def keys_of(table: str) -> list[str]:
    return [key for key, *_ in golden.recipe.load_keys(golden.DATA / table)]


@cache
def pose_backbone() -> dict[str, Tensor]:
    """The backbone of the official tiny pose model, with the derived buffers of a real file."""
    table = golden.recipe.load_keys(golden.DATA / 'keys_pose_tiny.json')
    tensors = golden.official_state_dict('keys_pose_tiny.json')
    buffers = {key: torch.zeros(shape).long() for key, shape, kind in table if kind == 'int64'}
    return {
        key.removeprefix('backbone.'): tensor
        for key, tensor in {**buffers, **tensors}.items()
        if key.startswith('backbone.')
    }


def make_mmpose_backbone(with_rpe: bool = True) -> torch.nn.Module:
    """The backbone of mmpose, from the config that mmpose ships, with random weights."""
    import mmpose.models

    options = Config.fromfile(Path(mmpose.__file__).parent / MMPOSE_CONFIG).model.backbone
    options.pop('init_cfg')
    options.extra.with_rpe = with_rpe
    assert options.pop('type') == 'HRFormer'
    model = mmpose.models.backbones.HRFormer(**options)
    golden.recipe.fill_module(model)
    model.eval()  # does not return the model
    return model


@cache
def mmpose_keys() -> tuple[str, ...]:
    return tuple(make_mmpose_backbone().state_dict())


# Telling dialects apart


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@needs('mmpose')
def test_backbones_of_mmpose_and_ours_are_told_apart(prefix):
    ours = HRFormer(arch=TINY).state_dict()
    assert detect_dialect(prefix + key for key in mmpose_keys()) == 'mmpose'
    assert detect_dialect(prefix + key for key in ours) == 'mmhrformer'


@pytest.mark.parametrize(
    ('table', 'dialect'),
    [
        ('keys_cls_tiny.json', 'official-cls'),
        ('keys_cls_base.json', 'official-cls'),
        ('keys_pose_small.json', 'official-pose'),
        ('keys_seg_small_w7.json', 'official-seg'),
        ('keys_seg_base_w13.json', 'official-seg'),
    ],
)
def test_official_checkpoints_are_told_apart(table, dialect):
    assert detect_dialect(keys_of(table)) == dialect


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_official_backbones_are_recognized(prefix):
    keys = [key for key in keys_of('keys_cls_small.json') if not key.startswith(CLS_HEAD)]
    assert detect_dialect(prefix + key for key in keys) == 'official-backbone'


@pytest.mark.parametrize('build', [golden.CLS_CONFIGS['tiny'], golden.SEG_CONFIGS['small']])
def test_whole_models_of_ours_are_recognized(build):
    assert detect_dialect(golden.build(build).state_dict()) == 'mmhrformer'


@pytest.mark.parametrize(
    'keys',
    [
        [],
        ['conv1.weight', 'layer1.0.conv1.weight', 'fc.weight'],
        ['backbone.stage2.0.branches.0.0.conv1.weight', 'keypoint_head.final_layer.weight'],
    ],
    ids=['nothing', 'ResNet', 'HRNet'],
)
def test_checkpoints_of_other_models_are_refused(keys):
    with pytest.raises(ValueError, match='not an HRFormer checkpoint in a known format') as error:
        detect_dialect(keys)
    for word in ['official-cls', 'mmpose', f'{len(keys)} tensors', *keys]:
        assert word in str(error.value)


# Taking tensors out of files


@pytest.mark.parametrize(
    'wrap',
    [
        lambda tensors: tensors,
        lambda tensors: {'model': tensors, 'epoch': 3, 'config': {'a': 1}},
        lambda tensors: {'state_dict': tensors, 'meta': {}, 'optimizer': {'state': {}}},
        lambda tensors: {'state_dict': {f'module.{k}': v for k, v in tensors.items()}},
        lambda tensors: {**tensors, 'epoch': 3},
    ],
    ids=['bare', 'model', 'state_dict', 'module', 'number'],
)
def test_tensors_are_found_in_their_wrappings(wrap):
    tensors = {'a.weight': torch.zeros(1), 'model.module.b': torch.ones(1)}
    assert unwrap(wrap(tensors)) == tensors


# Converting


def test_names_of_a_classifier():
    tensors = {key: torch.empty(0, device='meta') for key in keys_of('keys_cls_tiny.json')}
    converted, report = convert(tensors)
    model = golden.build(golden.CLS_CONFIGS['tiny'])
    assert set(converted) == set(model.state_dict())
    assert report.dialect == 'official-cls'
    assert report.renamed['classifier.bias'] == 'head.fc.bias'
    assert report.renamed['final_layer.0.weight'] == 'neck.0.final_layer.0.weight'
    assert report.renamed['conv1.weight'] == 'backbone.conv1.weight'


def test_report_names_tensors_as_they_are_in_the_file():
    tensors = {key: torch.empty(0, device='meta') for key in keys_of('keys_cls_tiny.json')}
    _, report = convert(tensors)
    assert set(report.renamed) <= set(tensors)
    assert set(report.dropped) <= set(tensors)
    block = 'stage2.0.branches.0.0'
    assert report.renamed[f'{block}.mlp.fc1.bias'] == f'backbone.{block}.ffn.fc1.bias'


@pytest.mark.parametrize(
    ('table', 'config'),
    [
        ('keys_pose_tiny.json', golden.POSE_CONFIGS['tiny']),
        ('keys_seg_small_w7.json', golden.SEG_CONFIGS['small']),
    ],
)
def test_names_and_shapes_of_pose_and_segmentation_models(table, config):
    entries = golden.recipe.load_keys(golden.DATA / table)
    converted, _ = convert({key: torch.empty(shape, device='meta') for key, shape, _ in entries})
    ours = {key: tensor.shape for key, tensor in golden.build(config).state_dict().items()}
    assert {key: tensor.shape for key, tensor in converted.items()} == ours


def test_query_key_and_value_are_joined_in_this_order():
    tensors = pose_backbone()
    converted, report = convert(tensors)
    block = 'stage3.2.branches.1.1'
    for kind in ('weight', 'bias'):
        parts = [tensors[f'{block}.attn.attn.{name}_proj.{kind}'] for name in 'qkv']
        assert torch.equal(converted[f'{block}.attn.qkv.{kind}'], torch.cat(parts))
    assert len(report.joined) == 2 * 38  # weight and bias of each block
    assert len(report.dropped) == 38  # relative_position_index
    assert report.dialect == 'official-backbone'


def test_joined_projections_are_where_our_models_have_them():
    tensors = pose_backbone()
    converted, report = convert(tensors)
    block = 'stage2.0.branches.0.0.attn.'
    leaves = [key.removeprefix(block) for key in converted if key.startswith(block)]
    own = HRFormer(arch='tiny').state_dict()
    assert leaves == [key.removeprefix(block) for key in own if key.startswith(block)]
    olds = [old for old, new in report.renamed.items() if new == f'{block}qkv.bias']
    assert olds == [f'{block}attn.{part}_proj.bias' for part in 'kvq']  # as in the file
    assert set(report.renamed.values()) <= set(converted)


@pytest.mark.parametrize('part', ['q_proj', 'k_proj', 'v_proj'])
def test_incomplete_projections_are_an_error_that_names_them(part):
    tensors = dict(pose_backbone())
    del tensors[f'stage3.0.branches.1.0.attn.attn.{part}.bias']
    with pytest.raises(ValueError, match=rf"without '{part}\.bias'") as error:
        convert(tensors)
    assert 'stage3.0.branches.1.0.attn.attn.' in str(error.value)


@pytest.mark.parametrize('name', ['ffn.fc1.weight', 'attn.proj.bias', 'attn.qkv.weight'])
def test_two_names_of_a_tensor_are_refused(name):
    name = f'stage2.0.branches.1.0.{name}'
    shape = HRFormer(arch='tiny').state_dict()[name].shape
    state_dict = {**pose_backbone(), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"'{re.escape(name)}'.* same tensor .* mixes two files"):
        convert(state_dict)
    with pytest.raises(ValueError, match='mixes two files'):
        HRFormer(arch='tiny').load_state_dict(state_dict)


def test_converting_twice_changes_nothing_more():
    once, _ = convert(pose_backbone())
    twice, report = convert(once)
    assert report.dialect == 'mmhrformer'
    assert list(twice) == list(once)
    assert not report.renamed
    assert not report.joined


# Loading into a backbone with plain PyTorch


@pytest.mark.parametrize(
    'wrap',
    [
        lambda tensors: tensors,
        lambda tensors: {f'backbone.{k}': v for k, v in tensors.items()},
        lambda tensors: {f'module.backbone.{k}': v for k, v in tensors.items()},
        lambda tensors: {'model': tensors},
    ],
    ids=['bare', 'backbone', 'module.backbone', 'model'],
)
def test_load_state_dict_takes_official_names(wrap):
    model = HRFormer(arch='tiny', out_indices=(0,), upsample='bilinear')
    state_dict = wrap(pose_backbone())
    before = copy.copy(state_dict)
    model.load_state_dict(state_dict, strict=True)
    assert list(state_dict) == list(before)
    assert all(state_dict[key] is before[key] for key in before)
    ours, official = model.state_dict(), pose_backbone()
    block = 'stage4.1.branches.3.0'
    for mine, theirs in [
        ('conv1.weight', 'conv1.weight'),
        (f'{block}.attn.proj.weight', f'{block}.attn.attn.out_proj.weight'),
        (f'{block}.ffn.norm3.running_var', f'{block}.mlp.norm3.running_var'),
    ]:
        assert torch.equal(ours[mine], official[theirs])


def test_load_state_dict_takes_official_names_below_a_prefix():
    model = torch.nn.ModuleDict(dict(encoder=HRFormer(arch='tiny', out_indices=(0,))))
    state_dict = {f'encoder.{key}': tensor for key, tensor in pose_backbone().items()}
    model.load_state_dict(state_dict, strict=True)
    assert torch.equal(model['encoder'].conv1.weight, pose_backbone()['conv1.weight'])


def test_strict_loading_still_finds_what_does_not_fit():
    state_dict = dict(pose_backbone())
    del state_dict['stage2.0.branches.0.0.mlp.fc1.bias']
    state_dict['nonsense.weight'] = torch.zeros(1)
    model = HRFormer(arch='tiny', out_indices=(0,))
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state_dict, strict=True)
    assert 'stage2.0.branches.0.0.ffn.fc1.bias' in str(error.value)
    assert 'nonsense.weight' in str(error.value)


def test_strict_loading_finds_bias_tables_of_blocks_that_are_not_there():
    table = 'stage2.0.branches.0.{}.attn.relative_position_bias_table'
    state_dict = HRFormer(arch=TINY).state_dict()
    state_dict[table.format(1)] = state_dict[table.format(0)]
    with pytest.raises(RuntimeError, match=rf'Unexpected key.*{re.escape(table.format(1))}'):
        HRFormer(arch=TINY).load_state_dict(state_dict)


def test_large_weights_are_finite():
    """Even if their sum is not finite."""
    large = torch.full((4,), 3e38)
    check_finite(dict(large=large, half=large.clamp(max=6e4).half(), counter=torch.tensor(7)))
    for value in (float('nan'), float('inf'), -float('inf')):
        with pytest.raises(ValueError, match=r"in 1 of 2 tensors, the first ones \['bad'\]"):
            check_finite(dict(large=large, bad=torch.tensor([1.0, value])))


def test_tensors_of_another_architecture_are_refused():
    with pytest.raises(RuntimeError, match='size mismatch'):
        HRFormer(arch=TINY).load_state_dict(pose_backbone(), strict=False)


def test_checkpoint_without_blocks_of_the_backbone_is_refused():
    state_dict = {'stage3.0.branches.0.0.attn.qkv.weight': torch.zeros(1)}
    with pytest.raises(ValueError, match=r'known format|no tensor for the blocks'):
        HRFormer(arch=TINY).load_state_dict(state_dict, strict=False)


@pytest.mark.parametrize('with_rpe', [True, False])
@needs('mmpose')
def test_backbone_of_mmpose_computes_the_same_here(with_rpe):
    theirs = make_mmpose_backbone(with_rpe)
    ours = HRFormer('small', with_rpe=with_rpe, upsample='bilinear', out_indices=(0,)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = golden.image((1, 3, 64, 96))
    with torch.no_grad():
        (expected,) = theirs(x)
        (out,) = ours(x)
    assert expected.abs().max() > 1
    assert (out - expected).abs().max() < 1e-4


# Relative position bias of another window


@pytest.mark.parametrize('window', [7, 13, 15])
@pytest.mark.parametrize('block', ['stage2.0.branches.0.0', 'stage4.1.branches.3.1'])
def test_bias_tables_are_resized_as_in_the_official_code(block, window):
    goldens = golden.load('rpe_interp.npz')
    name = f'{block}.attn.attn.relative_position_bias_table'
    table = resize_bias_table(torch.from_numpy(goldens[f'w7.{name}']), window)
    assert table.is_contiguous()
    assert golden.recipe.compare(goldens, f'w{window}.{name}', table)['max_abs'] < 1e-6


@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16, torch.double])
def test_bias_tables_are_resized_in_any_data_type(dtype):
    table = torch.rand(13**2, 2, generator=torch.Generator().manual_seed(0))
    found = resize_bias_table(table.to(dtype), 9)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), resize_bias_table(table, 9), atol=4e-3, rtol=0)


def test_bias_tables_are_resized_when_loaded_into_other_windows():
    model = HRFormer(arch=TINY, window_size=7)
    golden.recipe.fill_module(model)
    other = HRFormer(arch=TINY, window_size=(7, 9, 3, 13))
    other.load_state_dict(model.state_dict(), strict=True)
    for stream, window in enumerate((7, 9, 3, 13)):
        name = f'stage4.0.branches.{stream}.0.attn.relative_position_bias_table'
        expected = resize_bias_table(model.state_dict()[name], window)
        assert torch.equal(other.state_dict()[name], expected)
    assert torch.equal(
        other.state_dict()['stage4.0.branches.0.0.attn.relative_position_bias_table'],
        model.state_dict()['stage4.0.branches.0.0.attn.relative_position_bias_table'],
    )


@pytest.mark.parametrize('rows', [13 * 9, 8 * 8])
def test_tables_of_no_square_window_are_refused(rows):
    state_dict = HRFormer(arch=TINY).state_dict()
    state_dict['stage2.0.branches.0.0.attn.relative_position_bias_table'] = torch.zeros(rows, 1)
    with pytest.raises(
        ValueError, match=f'has {rows} rows, which does not match any square window'
    ):
        HRFormer(arch=TINY).load_state_dict(state_dict)

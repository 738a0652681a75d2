"""Names given back to other codes, and files that are written completely or not at all."""

from __future__ import annotations

import os
import stat
import sys
from functools import cache
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from needs import may_need
from torch import Tensor

from mmhrformer import HRFormer
from mmhrformer.checkpoints import convert, detect_dialect, read_checkpoint, unwrap
from mmhrformer.checkpoints.writing import check_destination, to_dialect, wrap, write_checkpoint

TINY = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
TABLES = [
    'keys_cls_tiny.json',
    'keys_cls_small.json',
    pytest.param('keys_cls_base.json', marks=pytest.mark.slow),
    'keys_pose_tiny.json',
    'keys_pose_small.json',
    pytest.param('keys_pose_base.json', marks=pytest.mark.slow),
    'keys_seg_small_w7.json',
    pytest.param('keys_seg_base_w13.json', marks=pytest.mark.slow),
    'keys_seg_base_w15.json',
]
WHOLE_MODELS = {
    'cls': golden.CLS_CONFIGS['tiny'],
    'pose': golden.POSE_CONFIGS['tiny'],
    'seg': golden.SEG_CONFIGS['small'],
}

pytestmark = [
    pytest.mark.filterwarnings('ignore:``build_loss`` would'),
    may_need('mmpose', 'mmseg'),
]


def swin_index(window: int) -> Tensor:
    """The index of relative positions, as the official codes compute it."""
    coords = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing='ij'))
    coords = coords.reshape(2, -1)
    relative = (coords[:, :, None] - coords[:, None, :]).transpose(1, 2, 0) + window - 1
    return torch.from_numpy(relative[..., 0] * (2 * window - 1) + relative[..., 1])


def official_file(table: str) -> dict:
    """An official checkpoint with everything that a real one has."""
    task = table.split('_')[1]
    content = golden.official_checkpoint(task, table)
    container = 'model' if task == 'cls' else 'state_dict'
    prefix = 'module.' if task == 'seg' else ''
    tensors = {}
    for key, shape, _ in golden.recipe.load_keys(golden.DATA / table):
        index = key.endswith('relative_position_index')
        key = prefix + key
        tensors[key] = swin_index(round(shape[0] ** 0.5)) if index else content[container][key]
    return {**content, container: tensors}


def make_backbone(**options) -> HRFormer:
    model = HRFormer(arch=TINY, **options)
    golden.recipe.fill_module(model)
    return model.eval()


@cache
def whole_model(task: str) -> dict[str, Tensor]:
    """The tensors of a model of ours; not to be changed."""
    model = golden.build(WHOLE_MODELS[task])
    golden.recipe.fill_module(model)
    return model.state_dict()


def mmpose_config(**extra) -> dict:
    from mmpose import models

    folder = Path(models.__file__).parents[1] / '.mim/configs/body_2d_keypoint/topdown_heatmap'
    name = 'coco/td-hm_hrformer-small_8xb32-210e_coco-256x192.py'
    cfg = Config.fromfile(folder / name).model
    del cfg.backbone['init_cfg']
    cfg.backbone.extra.update(extra)
    return cfg


def make_mmpose_backbone(window: int = 7, **extra) -> torch.nn.Module:
    cfg = mmpose_config(**extra).backbone
    for stage in ('stage2', 'stage3', 'stage4'):
        windows = cfg.extra[stage]['window_sizes']
        cfg.extra[stage]['window_sizes'] = (window,) * len(windows)
    assert cfg.pop('type') == 'HRFormer'
    model = sys.modules['mmpose.models'].backbones.HRFormer(**cfg)
    model.eval()  # does not return the model
    return model


def assert_same(tensors: dict, expected: dict) -> None:
    assert set(tensors) == set(expected)
    for key, tensor in expected.items():
        assert tensors[key].dtype == tensor.dtype, key
        assert torch.equal(tensors[key], tensor), key


# There and back


@pytest.mark.parametrize('table', TABLES)
def test_official_files_come_back_as_they_were(table):
    content = official_file(table)
    ours, _ = convert(unwrap(content))
    theirs = to_dialect(ours, 'official')
    again = wrap(theirs)
    container = 'model' if 'cls' in table else 'state_dict'
    assert set(again) <= set(content)
    assert list(again[container]) == list(content[container])
    assert_same(again[container], content[container])
    entries = golden.recipe.load_keys(golden.DATA / table)
    found = [[key, list(v.shape), str(v.dtype).split('.')[1]] for key, v in theirs.items()]
    assert found == entries
    back, _ = convert(theirs)
    assert list(back) == list(ours)
    assert_same(back, ours)


@pytest.mark.parametrize('task', WHOLE_MODELS)
def test_models_of_ours_come_back_from_the_official_names(task):
    theirs = to_dialect(whole_model(task), 'official')
    assert detect_dialect(theirs) == f'official-{task}'
    back, report = convert(theirs)
    assert_same(back, whole_model(task))
    assert len(report.joined) == 2 * len(report.dropped)  # weight and bias; one index


def test_models_of_ours_come_back_from_the_names_of_mmpose():
    theirs = to_dialect(whole_model('pose'), 'mmpose')
    assert detect_dialect(theirs) == 'mmpose'
    assert_same(convert(theirs)[0], whole_model('pose'))


@pytest.mark.parametrize('with_rpe', [True, False])
def test_backbone_of_mmpose_comes_back_as_it_was(with_rpe):
    tensors = make_mmpose_backbone(with_rpe=with_rpe).state_dict()
    ours, _ = convert(tensors)
    assert detect_dialect(ours) == 'mmhrformer'
    again = to_dialect(ours, 'mmpose')
    assert list(again) == list(tensors)
    assert_same(again, tensors)


@pytest.mark.parametrize('target', ['official', 'mmpose', 'mmhrformer'])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('window', [7, (7, 4, 3, 13)])
def test_backbones_of_any_window_come_back(target, prefix, window):
    ours = make_backbone(window_size=window).state_dict()
    ours = {prefix + key: tensor for key, tensor in ours.items()}
    theirs = to_dialect(ours, target)
    assert all(key.startswith(prefix) for key in theirs)
    assert_same(convert(theirs)[0], ours)
    if target != 'mmhrformer':
        for stream, side in enumerate(window if isinstance(window, tuple) else 4 * (window,)):
            name = f'{prefix}stage4.0.branches.{stream}.0.attn.attn.relative_position_index'
            assert torch.equal(theirs[name], swin_index(side))


def test_any_dialect_can_be_given():
    content = unwrap(official_file('keys_pose_tiny.json'))
    assert_same(to_dialect(content, 'mmpose'), to_dialect(convert(content)[0], 'mmpose'))
    assert_same(to_dialect(content, 'official'), content)


def test_separated_projections_share_no_memory():
    ours = make_backbone().state_dict()
    theirs = to_dialect(ours, 'official')
    key = 'stage2.0.branches.0.0.attn.attn.q_proj.weight'
    assert theirs[key].untyped_storage().nbytes() == 4 * theirs[key].numel()


# mmpose's own models


def test_mmpose_loads_our_pose_estimator_strictly_and_computes_the_same():
    cfg = mmpose_config()
    ours = golden.build(golden.POSE_CONFIGS['small'])
    golden.recipe.fill_module(ours)
    with torch.no_grad():
        with DefaultScope.overwrite_default_scope('mmpose'):
            theirs = MODELS.build(cfg)
        theirs.load_state_dict(to_dialect(ours.state_dict(), 'mmpose'), strict=True)
        theirs.eval(), ours.eval()
        x = golden.image((1, 3, 64, 96))
        expected, out = ours(x, None), theirs(x, None)
    assert expected.abs().max() > 1
    assert (out - expected).abs().max() < 1e-4


@pytest.mark.parametrize(('window', 'with_rpe'), [(5, True), (7, False)])
def test_backbone_of_mmpose_loads_ours_strictly_and_computes_the_same(window, with_rpe):
    ours = HRFormer(
        'small', window_size=window, with_rpe=with_rpe, upsample='bilinear', out_indices=(0,)
    )
    golden.recipe.fill_module(ours)
    theirs = make_mmpose_backbone(window, with_rpe=with_rpe)
    theirs.load_state_dict(to_dialect(ours.state_dict(), 'mmpose'), strict=True)
    x = golden.image((1, 3, 64, 64))
    with torch.no_grad():
        assert (theirs(x)[0] - ours.eval()(x)[0]).abs().max() < 1e-4


def test_buffers_are_those_of_mmpose():
    theirs = make_mmpose_backbone(window=5).state_dict()
    ours = to_dialect(HRFormer('small', window_size=5, out_indices=(0,)).state_dict(), 'mmpose')
    names = [key for key in theirs if key.endswith('relative_position_index')]
    assert len(names) == 44
    assert all(torch.equal(ours[key], theirs[key]) for key in names)


# Backbones alone, and what cannot be converted


@pytest.mark.parametrize('target', ['official', 'mmpose', 'mmhrformer'])
@pytest.mark.parametrize('task', WHOLE_MODELS)
def test_backbone_of_a_whole_model_goes_anywhere(task, target):
    theirs = to_dialect(whole_model(task), target, backbone_only=True)
    assert detect_dialect(theirs) == {'official': 'official-backbone'}.get(target, target)
    expected = {
        key.removeprefix('backbone.'): tensor
        for key, tensor in whole_model(task).items()
        if key.startswith('backbone.')
    }
    assert_same(convert(theirs)[0], expected)


def test_backbone_only_changes_nothing_in_a_bare_backbone():
    ours = make_backbone().state_dict()
    assert_same(to_dialect(ours, 'mmpose', backbone_only=True), to_dialect(ours, 'mmpose'))


@pytest.mark.parametrize(
    ('task', 'target', 'extra', 'named'),
    [
        ('cls', 'mmpose', None, 'neck.0.incre_modules'),
        ('seg', 'mmpose', None, 'decode_head.0'),
        ('pose', 'official', 'head.deconv_layers.0.weight', 'head.final_layer.weight'),
        ('cls', 'official', 'head.layers.0.weight', 'neck.0.incre_modules'),
    ],
)
def test_other_heads_are_refused_with_the_remedy(task, target, extra, named):
    tensors = dict(whole_model(task))
    if extra:
        tensors[extra] = torch.zeros(1)
    with pytest.raises(ValueError, match=f'no {target} HRFormer has this neck or head') as error:
        to_dialect(tensors, target)
    assert named in str(error.value)
    assert '--backbone-only' in str(error.value)
    assert to_dialect(tensors, target, backbone_only=True)


def test_official_head_with_missing_layers_is_refused():
    """A linear classifier on another neck has the name of the official one, but not its form."""
    tensors = {key: v for key, v in whole_model('cls').items() if not key.startswith('neck.')}
    with pytest.raises(ValueError, match=r"2 tensors such as 'head\.fc\."):
        to_dialect(tensors, 'official')


def test_official_codes_need_bias_tables():
    ours = make_backbone(with_rpe=False)
    with pytest.raises(ValueError, match='with_rpe=False') as error:
        to_dialect(ours.state_dict(), 'official')
    table = 'stage2.0.branches.0.0.attn.relative_position_bias_table'
    assert f'there is no {table!r}' in str(error.value)


def test_bias_tables_of_zero_change_no_output():
    """The remedy that the error above names."""
    ours, other = make_backbone(with_rpe=False), make_backbone()
    other.load_state_dict(ours.state_dict(), strict=False)
    for key, parameter in other.named_parameters():
        if key.endswith('relative_position_bias_table'):
            torch.nn.init.zeros_(parameter)
    x = golden.image((1, 3, 64, 96))
    with torch.no_grad():
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(ours(x), other(x)))
    assert to_dialect(other.state_dict(), 'official')


def test_unknown_targets_and_foreign_tensors_are_refused():
    with pytest.raises(ValueError, match=r"target='timm' is unknown: choose one of \['official'"):
        to_dialect(make_backbone().state_dict(), 'timm')
    with pytest.raises(ValueError, match='not an HRFormer checkpoint in a known format'):
        to_dialect({'fc.weight': torch.zeros(1)}, 'official')


# Wrapping


@pytest.mark.parametrize(
    ('task', 'target', 'keys'),
    [
        ('cls', 'official', ['model']),
        ('pose', 'official', ['meta', 'state_dict']),
        ('seg', 'official', ['config_dict', 'state_dict']),
        ('pose', 'mmpose', ['meta', 'state_dict']),
        ('seg', 'mmhrformer', ['meta', 'state_dict']),
    ],
)
def test_files_are_packed_as_their_code_does(task, target, keys):
    tensors = to_dialect(whole_model(task), target)
    content = wrap(tensors, {'source': 'a.pth'})
    assert list(content) == keys
    assert content.get('meta', {'source': 'a.pth'}) == {'source': 'a.pth'}
    assert content.get('config_dict', {}) == {}
    prefix = 'module.' if keys[0] == 'config_dict' else ''
    assert list(content[keys[-1]]) == [prefix + key for key in tensors]
    assert_same(unwrap(content), tensors)


def test_backbones_are_packed_as_training_starts_from_them():
    tensors = to_dialect(whole_model('cls'), 'official', backbone_only=True)
    assert list(wrap(tensors)) == ['model']
    assert 'conv1.weight' in wrap(tensors)['model']


# Writing


def test_file_is_read_as_it_was_written(tmp_path):
    content = wrap(make_backbone().state_dict(), {'epoch': 3})
    write_checkpoint(content, tmp_path / 'a.pth')
    write_checkpoint(content, str(tmp_path / 'b'))
    for name in ('a.pth', 'b'):
        again = read_checkpoint(tmp_path / name)
        assert again['meta'] == {'epoch': 3}
        assert_same(again['state_dict'], content['state_dict'])
    assert {path.name for path in tmp_path.iterdir()} == {'a.pth', 'b'}


@pytest.mark.parametrize('target', ['official', 'mmpose', 'mmhrformer'])
def test_safetensors_are_read_as_they_were_written(tmp_path, target):
    safetensors = pytest.importorskip('safetensors')
    tensors = to_dialect(make_backbone().state_dict(), target)
    tensors['stage2.half'] = torch.ones(2, 3).half().T  # a view, not contiguous
    tensors['stage2.tied'] = tensors['stage2.half']
    path = tmp_path / 'a.safetensors'
    write_checkpoint(wrap(tensors), path)
    assert_same(read_checkpoint(path), tensors)
    with safetensors.safe_open(path, 'pt') as file:
        assert file.metadata() == {'format': 'pt', 'dialect': detect_dialect(tensors)}


def test_safetensors_without_the_package_are_refused_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    for function in (check_destination, lambda path: write_checkpoint({}, path)):
        with pytest.raises(
            ImportError, match='pip install safetensors, or choose another extension'
        ):
            function(tmp_path / 'a.safetensors')
    assert not list(tmp_path.iterdir())


def test_existing_file_stays_unless_asked(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(b'precious')
    with pytest.raises(FileExistsError, match=r'a\.pth.* exists: .*overwrite') as error:
        write_checkpoint({'a': torch.zeros(1)}, path)
    assert '--overwrite' in str(error.value)
    assert path.read_bytes() == b'precious'
    write_checkpoint({'a': torch.zeros(1)}, path, overwrite=True)
    assert torch.equal(read_checkpoint(path)['a'], torch.zeros(1))


def test_link_stays_a_link(tmp_path):
    (tmp_path / 'real.pth').write_bytes(b'old')
    (tmp_path / 'link.pth').symlink_to('real.pth')
    write_checkpoint({'a': torch.zeros(1)}, tmp_path / 'link.pth', overwrite=True)
    assert (tmp_path / 'link.pth').is_symlink()
    assert 'a' in read_checkpoint(tmp_path / 'real.pth')


def test_places_that_cannot_be_written_are_errors_that_name_them(tmp_path):
    with pytest.raises(IsADirectoryError, match='is a folder: specify a file'):
        write_checkpoint({}, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere'"):
        write_checkpoint({}, tmp_path / 'nowhere' / 'a.pth')


def test_file_has_the_permissions_that_new_files_get(tmp_path):
    write_checkpoint({}, tmp_path / 'a.pth')
    (tmp_path / 'other').touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ('a.pth', 'other')]
    assert modes[0] == modes[1]


class Unwritable:
    def __reduce__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, name):
    if name.endswith('.safetensors'):
        pytest.importorskip('safetensors')
    resource = pytest.importorskip('resource')
    (tmp_path / name).write_bytes(b'old')
    content = make_backbone().state_dict()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"cannot write .*{name}': File too large$"):
            write_checkpoint(content, tmp_path / name, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b'old'


def test_interruption_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(b'old')
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({'a': torch.zeros(9), 'b': Unwritable()}, path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']
    assert path.read_bytes() == b'old'


def test_file_reaches_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    path, synced = tmp_path / 'a.pth', []

    def fsync(number):
        synced.append((os.fstat(number).st_size > 0, path.exists()))

    monkeypatch.setattr(os, 'fsync', fsync)
    write_checkpoint({'a': torch.zeros(9)}, path)
    assert synced == [(True, False), (True, True)]  # the file, then the folder with its name

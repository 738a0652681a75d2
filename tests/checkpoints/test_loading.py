"""Loading checkpoints of any dialect into whole models, and the report of it."""

from __future__ import annotations

import copy
import logging
import re
from functools import cache

import golden
import mmengine.runner
import pytest
import torch
from needs import may_need
from torch import nn

from mmhrformer import HRFormer, load_checkpoint
from mmhrformer.checkpoints import loading

pytestmark = may_need('mmpose', 'mmseg')

TINY = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)


@cache
def official(task: str) -> dict:
    """An official checkpoint of the tiny architecture; not to be changed."""
    return golden.official_checkpoint(task, f'keys_{task}_tiny.json')


def classifier() -> nn.Module:
    return golden.build(golden.CLS_CONFIGS['tiny'])


def pose_estimator(**options) -> nn.Module:
    return golden.build(golden.POSE_CONFIGS['tiny'], **options)


def make_backbone(**options) -> HRFormer:
    model = HRFormer(arch=TINY, **options)
    golden.recipe.fill_module(model)
    return model


def assert_equal(model: nn.Module, state_dict: dict) -> None:
    own = model.state_dict()
    assert set(own) == set(state_dict)
    assert all(torch.equal(own[key], tensor) for key, tensor in state_dict.items())


def test_official_classifier_fits_completely():
    model = classifier()
    report = load_checkpoint(model, official('cls'), strict=True)
    assert report.dialect == 'official-cls'
    assert (report.missing, report.unused) == ([], [])
    assert report.used == len(model.state_dict())
    tensors = official('cls')['model']
    assert torch.equal(model.head.fc.weight, tensors['classifier.weight'])
    assert torch.equal(model.backbone.bn1.running_mean, tensors['bn1.running_mean'])


def test_imagenet_checkpoint_in_a_pose_estimator_is_accounted_for(messages):
    """Every tensor of the model is used or missing, every tensor of the file used or not."""
    model = pose_estimator()
    report = load_checkpoint(model, official('cls'))
    assert report.missing == ['head.final_layer.weight', 'head.final_layer.bias']
    assert report.used == len(model.state_dict()) - 2
    exchange = [f'stage4.1.fuse_layers.{i}.' for i in (1, 2, 3)]
    heads = ['incre_modules.', 'downsamp_modules.', 'final_layer.', 'classifier.']
    without_use = (*exchange, *heads)
    assert sorted(report.unused) == sorted(
        key for key in official('cls')['model'] if key.startswith(without_use)
    )
    in_file = len(official('cls')['model']) - 2 * len(report.joined)  # three became one
    assert report.used + len(report.unused) == in_file
    assert len(messages) == 1
    assert messages[0] == str(report)
    assert f'official-cls checkpoint: {report.used} tensors used' in messages[0]
    for key in report.missing:
        assert f'missing in the checkpoint: {key}' in messages[0]
    for key in report.unused:
        assert f'not used by the model: {key}' in messages[0]


def test_tables_that_the_model_does_not_have_do_not_count_as_used(messages):
    model = pose_estimator(**{'model.backbone.with_rpe': False})
    report = load_checkpoint(model, official('pose'), strict=True)
    assert not report.missing
    assert report.used == len(model.state_dict())
    message = '38 relative position bias tables not used. A model trained with them gives other'
    assert any(message in said for said in messages)


def test_official_pose_estimator_without_some_tensors():
    tensors = dict(official('pose')['state_dict'])
    del tensors['backbone.bn1.weight'], tensors['keypoint_head.final_layer.bias']
    model = pose_estimator()
    report = load_checkpoint(model, tensors)
    assert sorted(report.missing) == ['backbone.bn1.weight', 'head.final_layer.bias']
    assert report.used == len(model.state_dict()) - 2
    with pytest.raises(RuntimeError, match=r'backbone\.bn1\.weight'):
        load_checkpoint(model, tensors, strict=True)


def test_only_incomplete_backbones_are_warned_of(monkeypatch):
    """A new head is what fine-tuning begins with."""
    levels = []
    monkeypatch.setattr(loading, 'print_log', lambda *args: levels.append(args[-1]))
    load_checkpoint(pose_estimator(), official('cls'))
    tensors = dict(official('pose')['state_dict'])
    del tensors['backbone.bn1.weight']
    load_checkpoint(pose_estimator(), tensors)
    assert levels == [logging.INFO, logging.WARNING]


def test_strict_refuses_tensors_that_are_not_used():
    tensors = {**official('pose')['state_dict'], 'nonsense.weight': torch.zeros(1)}
    assert load_checkpoint(pose_estimator(), tensors).unused == ['nonsense.weight']
    with pytest.raises(RuntimeError, match=r'nonsense\.weight'):
        load_checkpoint(pose_estimator(), tensors, strict=True)


@pytest.mark.parametrize('kind', [str, lambda path: path], ids=['str', 'Path'])
def test_checkpoint_can_be_a_file(tmp_path, kind):
    model = make_backbone()
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, tmp_path / 'ours.pth')
    other = HRFormer(arch=TINY)
    report = load_checkpoint(other, kind(tmp_path / 'ours.pth'))
    assert report.dialect == 'mmhrformer'
    assert report.used == len(model.state_dict())
    assert_equal(other, model.state_dict())


def test_whole_model_goes_into_a_bare_backbone():
    model = HRFormer(arch='tiny')
    report = load_checkpoint(model, official('cls'))
    assert report.missing == []
    assert report.used == len(model.state_dict())
    assert torch.equal(model.conv1.weight, official('cls')['model']['conv1.weight'])
    assert 'classifier.weight' in report.unused
    assert set(report.unused) <= set(official('cls')['model'])


def test_bare_backbone_goes_into_a_whole_model():
    model = pose_estimator()
    tensors = {
        key.removeprefix('backbone.'): tensor
        for key, tensor in official('pose')['state_dict'].items()
        if key.startswith('backbone.')
    }
    report = load_checkpoint(model, tensors)
    assert report.dialect == 'official-backbone'
    assert report.missing == ['head.final_layer.weight', 'head.final_layer.bias']
    assert report.unused == []
    assert torch.equal(model.backbone.conv1.weight, tensors['conv1.weight'])


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('build', [pose_estimator, lambda: HRFormer('tiny', out_indices=(0,))])
def test_unused_tensors_have_their_names_in_the_file(prefix, build):
    """Whatever prefix was added or removed to make file and model meet."""
    model = HRFormer('tiny')
    tensors = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    report = load_checkpoint(build(), tensors)
    expected = {key for key in tensors if re.search(r'stage4\.1\.fuse_layers\.[123]', key)}
    assert set(report.unused) == expected


def test_checkpoint_of_mmpose_fits_completely():
    """mmpose's names differ inside the blocks only."""
    names = [('.attn.', '.attn.attn.')]
    model = pose_estimator()
    tensors = {}
    for key, tensor in model.state_dict().items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        tensors[key] = torch.rand_like(tensor.float()).to(tensor.dtype)
    report = load_checkpoint(model, {'meta': {}, 'state_dict': tensors}, strict=True)
    assert report.dialect == 'mmpose'
    assert report.used == len(tensors)
    key = 'backbone.stage2.0.branches.1.0.attn.qkv.weight'
    assert torch.equal(model.state_dict()[key], tensors[key.replace('.attn.', '.attn.attn.')])


def test_checkpoint_given_by_the_user_stays_as_it_was():
    checkpoint = {'model': dict(official('cls')['model']), 'epoch': 3}
    names, before = list(checkpoint['model']), copy.copy(checkpoint['model'])
    load_checkpoint(pose_estimator(), checkpoint)
    assert list(checkpoint) == ['model', 'epoch']
    assert list(checkpoint['model']) == names
    assert all(checkpoint['model'][name] is before[name] for name in names)


def test_weights_are_copied():
    model = make_backbone()
    tensors = model.state_dict()
    other = HRFormer(arch=TINY)
    load_checkpoint(other, tensors)
    nn.init.zeros_(other.conv1.weight)
    assert model.conv1.weight.abs().sum() > 0


def test_load_from_of_openmmlab_takes_our_checkpoints(tmp_path):
    """The call behind ``load_from`` in a config and ``--checkpoint``."""
    model = make_backbone()
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, tmp_path / 'ours.pth')
    other = HRFormer(arch=TINY)
    mmengine.runner.load_checkpoint(other, str(tmp_path / 'ours.pth'), strict=True)
    assert_equal(other, model.state_dict())


def test_unknown_dialect_is_an_error():
    with pytest.raises(ValueError, match='not an HRFormer checkpoint in a known format'):
        load_checkpoint(make_backbone(), {'state_dict': {'conv1.weight': torch.zeros(1)}})


def test_other_architecture_is_an_error_that_names_the_tensors():
    with pytest.raises(RuntimeError, match=r'size mismatch for .*stage2\.0\.branches'):
        load_checkpoint(make_backbone(), official('cls'))


def test_missing_file_is_an_error():
    with pytest.raises(FileNotFoundError, match=r'no/such/file\.pth'):
        load_checkpoint(make_backbone(), 'no/such/file.pth')


def test_other_classes_are_an_error_unless_they_are_wanted(messages):
    model = golden.build(golden.CLS_CONFIGS['tiny'], **{'model.head.num_classes': 7})
    before = model.head.fc.weight.clone()
    with pytest.raises(RuntimeError, match=r'(?s)set num_classes.*mismatch for head\.fc\.weight'):
        load_checkpoint(model, official('cls'))
    report = load_checkpoint(model, official('cls'), strict=True, new_classes=True)
    assert sorted(report.other_shape) == ['head.fc.bias', 'head.fc.weight']
    assert torch.equal(model.head.fc.weight, before)
    assert (report.missing, report.unused) == ([], [])
    assert report.used == len(model.state_dict()) - 2
    assert 'not loaded, for other classes: head.fc.weight' in messages[-1]
    assert torch.equal(model.backbone.conv1.weight, official('cls')['model']['conv1.weight'])


def test_new_classes_excuse_nothing_else():
    model = golden.build(golden.CLS_CONFIGS['tiny'], **{'model.head.num_classes': 7})
    checkpoint = dict(official('cls')['model'])
    checkpoint['conv1.weight'] = checkpoint['conv1.weight'][:32]
    for new_classes in (True, False):  # a head of other classes is not the remedy
        with pytest.raises(
            RuntimeError, match=r'(?s)build the model with the arch.*backbone\.conv1'
        ):
            load_checkpoint(model, checkpoint, new_classes=new_classes)


def test_resized_tables_are_reported(messages):
    model = make_backbone(window_size=7)
    report = load_checkpoint(make_backbone(window_size=5), model.state_dict(), strict=True)
    tables = [key for key in model.state_dict() if key.endswith('bias_table')]
    assert sorted(report.resized) == sorted(tables)
    assert f'{len(tables)} resized' in messages[-1]


def test_a_backbone_that_finds_nothing_says_so(messages, tmp_path):
    """mmengine looks for ``backbone.``, finds nothing, and would test random weights."""
    file = tmp_path / 'official.pth'
    torch.save(official('cls'), file)
    mmengine.runner.load_checkpoint(classifier(), str(file))
    said = [text for text in messages if 'write mmhrformer:// before its path' in text]
    assert said
    assert "nothing under 'backbone.'" in said[0]
    messages.clear()
    mmengine.runner.load_checkpoint(classifier(), f'mmhrformer://{file}', strict=True)
    assert not [text for text in messages if 'nothing under' in text]

"""Names of classes and keypoints, and sizes of images, that configs tell."""

from __future__ import annotations

import golden
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from needs import needs

from mmhrformer.datasets.meta import (
    default_size,
    find_classes,
    flip_indices_of_outputs,
    meta_of_dataset,
    names_of_outputs,
)

DATASET = dict(type='CIFAR10', metainfo=dict(classes=('a', 'b')))


@needs('mmpretrain')
@pytest.mark.parametrize(
    'dataset',
    [
        DATASET,
        dict(type='RepeatDataset', times=2, dataset=DATASET),
        dict(type='ConcatDataset', datasets=[DATASET, dict(type='CIFAR10')]),
        dict(type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[DATASET])),
    ],
    ids=lambda dataset: dataset['type'],
)
def test_data_sets_in_wrappers_tell_too(dataset):
    cfg = Config(dict(default_scope='mmpretrain', test_dataloader=dict(dataset=dataset)))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        assert meta_of_dataset(cfg)['classes'] == ('a', 'b')


@needs('mmpretrain')
def test_classes_may_be_an_option_of_the_data_set_or_a_file(tmp_path):
    (tmp_path / 'names.txt').write_text('a\nb\n')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        for options in (
            dict(classes=['a', 'b']),
            dict(classes=str(tmp_path / 'names.txt')),
            dict(metainfo=dict(classes=str(tmp_path / 'names.txt')), classes=['c']),
        ):
            dataset = dict(type='CIFAR10', **options)
            cfg = Config(dict(default_scope='mmpretrain', test_dataloader=dict(dataset=dataset)))
            assert find_classes(cfg, 2, {}) == (('a', 'b'), None)


@needs('mmpretrain')
def test_other_names_in_the_checkpoint_are_told(monkeypatch):
    said = []
    monkeypatch.setattr('mmhrformer.datasets.meta.print_log', lambda text, *_: said.append(text))
    cfg = Config(dict(default_scope='mmpretrain', test_dataloader=dict(dataset=DATASET)))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        for saved in (('a', 'b'), ('a', 'b', 'c'), ()):
            assert find_classes(cfg, 2, dict(classes=saved)) == (('a', 'b'), None)
        assert not said
        assert find_classes(cfg, 2, dict(classes=('a', 'c'))) == (('a', 'b'), None)
    assert "such as 'c' instead of 'b'" in said[0]


POINTS = [('head', ''), ('l', 'r'), ('r', 'l')]


@needs('mmpose')
def test_keypoints_are_those_of_the_config_not_of_the_class():
    info = {
        i: dict(name=name, id=i, color=[0, 0, 0], type='', swap=swap)
        for i, (name, swap) in enumerate(POINTS)
    }
    metainfo = dict(dataset_name='a', paper_info={}, keypoint_info=info, skeleton_info={})
    metainfo.update(joint_weights=[1.0] * 3, sigmas=[0.1] * 3)
    dataset = dict(type='CocoDataset', metainfo=metainfo)
    cfg = Config(dict(default_scope='mmpose', test_dataloader=dict(dataset=dataset)))
    with DefaultScope.overwrite_default_scope('mmpose'):
        assert names_of_outputs(cfg) == ['head', 'l', 'r']
        assert flip_indices_of_outputs(cfg) == [0, 2, 1]
        assert names_of_outputs(cfg, number=17) == flip_indices_of_outputs(cfg, number=17) == []
        saved = dict(keypoint_id2name={0: 'x', 1: 'y'}, flip_indices=[1, 0])
        assert names_of_outputs(cfg, saved, 2) == ['x', 'y']
        assert flip_indices_of_outputs(cfg, saved, 2) == [1, 0]


def test_without_data_nothing_is_told():
    assert meta_of_dataset(Config(dict(default_scope='mmpretrain'))) == {}


@pytest.mark.parametrize(
    ('config', 'size', 'first'),
    [
        ('hrformer_cls/hrformer-tiny_8xb128_in1k.py', (224, 224), 'tench'),
        ('hrformer_pose/td-hm_hrformer-small_8xb32-210e_coco-384x288.py', (384, 288), 'nose'),
        ('hrformer_seg/ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024.py', (512, 1024), 'road'),
        ('demo/hrformer-demo_1xb64-6e_digits.py', (32, 32), None),
        ('demo/ocrnet_hrformer-demo_1xb16-100_scenes-96x96.py', (96, 96), 'sky'),
    ],
)
def test_configs_tell_sizes_and_names(config, size, first):
    cfg = Config.fromfile(golden.CONFIGS / config)
    pytest.importorskip(cfg.default_scope)
    assert default_size(cfg) == size
    names = names_of_outputs(cfg)
    assert names[0].startswith(first) if first else names == []
    assert names_of_outputs(cfg, dict(classes=('x', 'y'))) == ['x', 'y']


STEPS = [
    (dict(type='TopdownAffine', input_size=(96, 128)), (128, 96)),
    (dict(type='RandomResizedCrop', scale=160), (160, 160)),
    (dict(type='RandomResizedCrop', scale=(64, 96)), (64, 96)),
    (dict(type='mmseg.RandomCrop', crop_size=(64, 96)), (64, 96)),
    (dict(type='CenterCrop', crop_size=(64, 96)), (96, 64)),
    (dict(type='Resize', scale=(64, 96)), (96, 64)),
    (dict(type='Resize', scale=(1000, 96), keep_ratio=True), (224, 224)),
]


@pytest.mark.parametrize(('step', 'size'), STEPS)
def test_size_is_that_of_the_pipeline_that_is_used(step, size):
    """Not from variables of a base config, which a child cannot change."""
    steps = [dict(type='Resize', scale=(1, 1)), dict(type='LoadAnnotations')] * (size[0] != 224)
    dataset = dict(type='A', pipeline=[*steps, step, dict(type='PackInputs')])
    for nested in (
        dataset,
        dict(type='RepeatDataset', dataset=dataset),
        dict(type='ConcatDataset', datasets=[dataset]),
    ):
        cfg = Config(dict(crop_size=(7, 7), train_dataloader=dict(dataset=nested)))
        assert default_size(cfg) == size
        assert default_size(Config(dict(test_dataloader=dict(dataset=nested)))) == size
    assert default_size(Config(dict(train_pipeline=[*steps, step]))) == size


def test_size_of_a_config_without_data():
    pose = dict(model=dict(head=dict(decoder=dict(type='UDPHeatmap', input_size=(96, 128)))))
    assert default_size(Config(pose)) == (128, 96)
    segmentor = dict(model=dict(decode_head=[], data_preprocessor=dict(type='A', size=(64, 96))))
    assert default_size(Config(segmentor)) == (64, 96)
    assert default_size(Config(dict(model=dict(type='A')))) == (224, 224)

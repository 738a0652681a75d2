"""What a config alone tells: missing data, dead options, a changed batch size."""

from __future__ import annotations

import logging
import sys

import pytest
from mmengine.config import Config

from mmhrformer.engine.preflight import (
    PreflightChecks,
    batch_size_change,
    dead_options,
    missing_data,
)
from mmhrformer.launch import find_config

CITYSCAPES = 'ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024'
COCO = 'td-hm_hrformer-small_8xb32-210e_coco-256x192'


def load(name: str) -> Config:
    return Config.fromfile(find_config(name))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ('config', 'root', 'chapter'),
    [
        ('hrformer-tiny_8xb128_in1k', 'data/imagenet', '#imagenet-1k'),
        (COCO, 'data/coco/', '#coco-keypoints'),
        (CITYSCAPES, 'data/cityscapes/', '#cityscapes'),
        (
            'ocrnet_hrformer-small_8xb2-60k_pascal-context-59-520x520',
            'data/VOCdevkit/VOC2010/',
            '#pascal-context',
        ),
        (
            'ocrnet_hrformer-small_8xb2-60k_coco-stuff10k-520x520',
            'data/coco_stuff10k/',
            '#coco-stuff-10k',
        ),
        (
            'ocrnet_hrformer-small_8xb2-150k_ade20k-520x520',
            'data/ade/ADEChallengeData2016/',
            '#ade20k',
        ),
    ],
)
def test_missing_data_root_is_named_with_its_chapter(config, root, chapter, folder):
    (line,) = missing_data(load(config), ['train_dataloader'])
    assert line == (
        f"train_dataloader.dataset.data_root: there is no '{root}'; docs/datasets.md{chapter} "
        'tells how to get it'
    )


def test_missing_parts_are_named_one_by_one(folder):
    (folder / 'data/coco/val2017').mkdir(parents=True)
    lines = missing_data(load(COCO), ['val_dataloader'])
    assert [line.split(';')[0] for line in lines] == [
        'val_dataloader.dataset.ann_file: there is no '
        "'data/coco/annotations/person_keypoints_val2017.json'",
        'val_dataloader.dataset.bbox_file: there is no '
        "'data/coco/person_detection_results/COCO_val2017_detections_AP_H_56_person.json'",
    ]


def test_missing_split_of_imagenet_is_named(folder):
    (folder / 'data/imagenet/train').mkdir(parents=True)
    cfg = load('hrformer-tiny_8xb128_in1k')
    (line,) = missing_data(cfg, ['train_dataloader', 'val_dataloader'])
    assert line.startswith("val_dataloader.dataset.split: there is no 'data/imagenet/val'")


def test_wrapped_and_remote_datasets(folder):
    inner = dict(type='CocoDataset', data_root='nowhere')
    for dataset in (
        dict(type='RepeatDataset', times=2, dataset=inner),
        dict(type='ConcatDataset', datasets=[inner, dict(inner, data_root='')]),
    ):
        (line,) = missing_data(dict(loader=dict(dataset=dataset)), ['loader'])
        assert "there is no 'nowhere'" in line
    remote = dict(type='CocoDataset', ann_file='s3://bucket/ann.json')
    assert missing_data(dict(loader=dict(dataset=remote)), ['loader']) == []


def check(cfg: Config, tool: str, monkeypatch, caplog) -> str:
    """Run the checks as if a tool had been started; return what was warned about."""
    monkeypatch.setattr(sys, 'argv', [f'/somewhere/{tool}.py'])
    said = []
    monkeypatch.setattr(
        'mmhrformer.engine.preflight.print_log',
        lambda text, logger, level: said.append((level, text)),
    )
    PreflightChecks(save_dir='').add_config(cfg)
    assert {level for level, _ in said} <= {logging.WARNING}
    return '\n'.join(text for _, text in said)


def test_tools_stop_and_others_warn(folder, monkeypatch, caplog):
    cfg = load(CITYSCAPES)
    for tool, loader in (('train', 'train_dataloader'), ('test', 'test_dataloader')):
        with pytest.raises(FileNotFoundError, match=f'(?s)data are missing.*{loader}'):
            check(cfg, tool, monkeypatch, caplog)
    assert 'Data are missing:\ntrain_dataloader' in check(cfg, 'notebook', monkeypatch, caplog)


def test_testing_needs_no_training_data(folder, monkeypatch, caplog):
    for part in ('leftImg8bit/val', 'gtFine/val'):
        (folder / 'data/cityscapes' / part).mkdir(parents=True)
    assert check(load(CITYSCAPES), 'test', monkeypatch, caplog) == ''
    with pytest.raises(FileNotFoundError, match='leftImg8bit/train'):
        check(load(CITYSCAPES), 'train', monkeypatch, caplog)


@pytest.mark.parametrize(
    ('option', 'remedy'),
    [
        (dict(fp16=dict(loss_scale='dynamic')), 'AmpOptimWrapper'),
        (dict(optimizer=dict(type='SGD')), 'optim_wrapper.optimizer'),
        (dict(total_epochs=3), 'train_cfg.max_epochs'),
        (dict(data_root='/elsewhere'), 'copied when the file was read'),
    ],
)
def test_options_without_effect_stop_a_run(option, remedy, folder, monkeypatch, caplog):
    cfg = load(CITYSCAPES)
    cfg.merge_from_dict(option)
    with pytest.raises(ValueError, match=f'(?s){next(iter(option))}: has no effect.*{remedy}'):
        check(cfg, 'notebook', monkeypatch, caplog)


def test_unknown_options_are_told(folder, monkeypatch, caplog):
    cfg = load(CITYSCAPES)
    cfg.my_option = dict(value=3)
    assert 'Nothing reads these options of the config: my_option.' in check(
        cfg, 'notebook', monkeypatch, caplog
    )


def test_used_variables_are_not_dead():
    variables = dict(root='data/x/', rates=[1, 2], unused='y')
    used = dict(path='data/x/train', inner=[dict(rates=[1, 2])])
    assert list(dead_options(Config(dict(variables, train_cfg=used)))) == ['unused']


def test_variables_may_grow_stale():
    cfg = load(CITYSCAPES)
    cfg.train_dataloader.dataset.data_root = cfg.val_dataloader.dataset.data_root = '/elsewhere'
    cfg.test_dataloader.dataset.data_root = '/elsewhere'
    assert dead_options(cfg) == {}


@pytest.mark.parametrize(
    ('gpus', 'options', 'images'),
    [
        (8, {}, None),
        (1, {'train_dataloader.batch_size': 8}, None),
        (2, {'optim_wrapper.accumulative_counts': 4}, None),
        (4, {}, '4 images a step (4 processes x 1)'),
        (1, {'optim_wrapper.accumulative_counts': 2}, '2 images a step (1 processes x 1 x 2 acc'),
        (1, {'auto_scale_lr.enable': True}, None),
    ],
)
def test_batch_size_that_the_rate_is_not_for(gpus, options, images):
    cfg = load(CITYSCAPES)
    cfg.merge_from_dict(options)
    warning = batch_size_change(cfg, gpus)
    if images is None:
        assert warning == ''
    else:
        assert images in warning
        assert 'learning rate 0.0001 is for 8' in warning
        assert 'auto_scale_lr.enable=True' in warning

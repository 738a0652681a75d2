"""Checks of a config alone: missing data, unused options, a changed batch size."""

from __future__ import annotations

import logging
import re
import sys

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS
from needs import needs
from torch.utils.data import DataLoader, Dataset

from mmhrformer.configs import find_config
from mmhrformer.engine.config_check import (
    ConfigCheckVisBackend,
    ConfigOptionError,
    accumulated_iterations,
    batch_size_change,
    dead_options,
    late_variables,
    missing_data,
    needs_gpu,
    other_length,
)
from mmhrformer.engine.data_check import biased_coordinates, other_codecs
from mmhrformer.registry import VISBACKENDS

CITYSCAPES = 'ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024'
IMAGENET = 'hrformer-tiny_8xb128_in1k'
DEMO = 'td-hm_hrformer-demo_1xb16-2e_figures-96x128'
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
        'explains how to get it'
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
    for args, lines in (
        (dict(backend='petrel'), 0),
        (dict(backend='disk', path_mapping={}), 0),
        (dict(backend='disk'), 1),
        (dict(backend='local'), 1),
    ):
        step = dict(type='LoadImageFromFile', backend_args=args)
        for dataset in (dict(inner, backend_args=args), dict(inner, pipeline=[step])):
            assert len(missing_data(dict(loader=dict(dataset=dataset)), ['loader'])) == lines


def missing(scope: str, **dataset) -> list[str]:
    return missing_data(dict(default_scope=scope, loader=dict(dataset=dataset)), ['loader'])


@needs('mmpretrain')
@pytest.mark.parametrize(
    ('options', 'lines'),
    [
        (dict(type='CIFAR10'), 0),
        (dict(type='mmpretrain.FashionMNIST', split='test'), 0),
        (dict(type='CIFAR100', download=False), 1),
        (dict(type='CUB', split='train'), 1),
        (dict(type='CustomDataset', download=True), 0),
    ],
)
def test_data_sets_that_fetch_themselves_are_left_alone(options, lines, folder):
    assert len(missing('mmpretrain', data_root='data/nowhere', **options)) == lines


@DATASETS.register_module()
class NumbersInMemory(Dataset):
    """A dataset that makes what it needs."""

    def __init__(self, data_root: str, split: str) -> None:
        raise NotImplementedError


@needs('mmpretrain', 'mmpose', 'mmseg')
def test_what_is_no_local_file_is_no_missing_one(folder):
    (folder / 'cars').mkdir()
    ann, s3 = str(folder / 'ann.json'), dict(backend='petrel', path_mapping={'data/': 's3://data/'})
    (folder / 'ann.json').write_text('{}')
    load = dict(type='LoadImageFromFile')
    labels = dict(data_prefix=dict(img_path='cars', seg_map_path='none'))
    for scope, dataset in (
        ('mmpretrain', dict(type='StanfordCars', data_root='cars', split='train')),  # no folder
        ('mmpretrain', dict(type='CustomDataset', metainfo=dict(classes=['a']))),
        ('mmpretrain', dict(type='NumbersInMemory', data_root='nowhere', split='train')),
        ('mmpretrain', dict(type=NumbersInMemory, data_root='nowhere', split='train')),
        ('mmpretrain', dict(type='CustomDataset', data_root='data/x', backend_args=s3)),
        (
            'mmseg',
            dict(type='ADE20KDataset', data_root='x', pipeline=[dict(load, backend_args=s3)]),
        ),
        ('mmseg', dict(type='ADE20KDataset', pipeline=[load], **labels)),
        ('mmpose', dict(type='CocoDataset', data_root='http://host/coco', ann_file='a.json')),
        ('mmpose', dict(type='CocoDataset', data_root='unused', ann_file=ann)),
        ('mmpose', dict(type='CocoDataset', data_prefix=dict(img=[str(folder)] * 2))),
    ):
        assert missing(scope, **dataset) == [], dataset
    assert missing_data(dict(loader=DataLoader([1])), ['loader', 'other']) == []


def test_every_data_set_in_any_wrapper_is_looked_at(folder):
    one = dict(type='CocoDataset', data_root='nowhere')
    own = dict(one, metainfo=dict(dataset_name='cats'))
    for loader, number in (
        (dict(dataset=dict(type='CombinedDataset', metainfo={}, datasets=[one, one])), 2),
        (dict(dataset=dict(type='MultiImageMixDataset', dataset=dict(one), pipeline=[])), 1),
        ([dict(dataset=one), dict(dataset=own)], 2),
    ):
        assert len(missing_data(dict(loader=loader), ['loader'])) == number
    (line,) = missing('mmpose', **own)
    assert 'docs/datasets.md' not in line  # which does not tell about cats


def check(cfg: Config, tool: str, monkeypatch, caplog) -> str:
    """Run the checks as if a tool had been started; return what was warned about."""
    monkeypatch.setattr(sys, 'argv', [f'/somewhere/{tool}.py'])
    said = []
    monkeypatch.setattr(
        'mmhrformer.engine.config_check.print_log',
        lambda text, logger, level: said.append((level, text)),
    )
    ConfigCheckVisBackend(save_dir='').add_config(cfg)
    assert {level for level, _ in said} <= {logging.WARNING}
    return '\n'.join(text for _, text in said)


def test_former_name_works():
    assert VISBACKENDS.get('mmhrformer.PreflightChecks') is ConfigCheckVisBackend


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
    with pytest.raises(ValueError, match=f'(?s){next(iter(option))} has no effect: .*{remedy}'):
        check(cfg, 'notebook', monkeypatch, caplog)


def test_unknown_options_are_told(folder, monkeypatch, caplog):
    cfg = load(CITYSCAPES)
    cfg.my_option = dict(value=3)
    assert 'These options of the config are not used: my_option.' in check(
        cfg, 'notebook', monkeypatch, caplog
    )


def test_used_variables_are_not_dead():
    variables = dict(root='data/x/', rates=[1, 2], unused='y')
    used = dict(path='data/x/train', inner=[dict(rates=[1, 2])])
    assert list(dead_options(Config(dict(variables, train_cfg=used)))) == ['unused']
    sgd = dict(type='SGD')  # a variable, in spite of its name
    assert dead_options(Config(dict(optimizer=sgd, optim_wrapper=dict(optimizer=sgd)))) == {}


def test_variables_may_grow_stale():
    cfg = load(CITYSCAPES)
    cfg.train_dataloader.dataset.data_root = cfg.val_dataloader.dataset.data_root = '/elsewhere'
    cfg.test_dataloader.dataset.data_root = '/elsewhere'
    assert dead_options(cfg) == {}


@pytest.mark.parametrize(
    ('test_cfg', 'fault'),
    [
        (dict(mode='whole'), ''),
        (dict(mode='slide', crop_size=(64, 32), stride=[32, 32]), ''),
        (dict(mode='slide', crop_size=(64, 64)), 'test_cfg.stride=None.*stride=(341, 341)'),
        (dict(mode='slide', crop_size=(64, 64), stride=32), 'test_cfg.stride=32'),
        (dict(mode='slide', crop_size=(64, 64), stride=(0, 9)), 'test_cfg.stride=(0, 9)'),
        (dict(mode='slide', stride=(64, 64)), 'test_cfg.crop_size=None'),
        (dict(mode='slide', crop_size=(64, 64), stride=(64, 65)), 'leaves pixels without'),
    ],
)
def test_a_sliding_window_has_its_sizes(test_cfg, fault, monkeypatch, caplog):
    cfg = load('ocrnet_hrformer-demo_1xb16-100_scenes-96x96')
    cfg.model.test_cfg = test_cfg
    if not fault:
        assert 'test_cfg' not in check(cfg, 'notebook', monkeypatch, caplog)
        return
    pattern = '.*'.join(re.escape(part) for part in fault.split('.*'))
    with pytest.raises(ConfigOptionError, match=pattern):
        check(cfg, 'notebook', monkeypatch, caplog)


@pytest.mark.parametrize(
    ('names', 'fault'),
    [
        ('abc', ''),
        ('ab', ''),
        ('bc', "'b' in 'flowers/val' is class 0, but in the training data 1: create the same"),
        ('abd', "'d' in 'flowers/val' is class 2, but in the training data none: create the same"),
    ],
)
@pytest.mark.parametrize('tool', ['train', 'test', 'browse_dataset'])
def test_classes_keep_their_indices(tool, names, fault, folder, monkeypatch, caplog):
    """mmpretrain numbers the folders of each dataset by themselves."""
    for path in (*(f'train/{name}' for name in 'abc'), *(f'val/{name}' for name in names)):
        (folder / 'flowers' / path).mkdir(parents=True)
    loaders = [
        dict(dataset=dict(type='CustomDataset', data_root='flowers', data_prefix=part))
        for part in ('train', 'val')
    ]
    cfg = Config(dict(train_dataloader=loaders[0], test_dataloader=loaders[1]))
    if fault and tool != 'browse_dataset':
        with pytest.raises(ConfigOptionError, match=f'test_dataloader.dataset: {fault}'):
            check(cfg, tool, monkeypatch, caplog)
    else:
        said = check(cfg, tool, monkeypatch, caplog)
        assert fault in said
        assert bool(fault) == ('indices' in said)


@pytest.mark.parametrize(
    ('train', 'test', 'faulty'),
    [
        ({}, {}, False),
        (dict(metainfo=dict(classes=('a', 'b'))), dict(metainfo=dict(classes=['a', 'b'])), False),
        (dict(metainfo=dict(classes=('a', 'b'))), dict(metainfo=dict(classes=('b', 'a'))), True),
        (dict(metainfo=dict(classes=('a', 'b'))), {}, True),
        (dict(metainfo=dict(classes=('a', 'b'))), dict(type='ADE20KDataset'), False),
    ],
)
def test_classes_are_those_of_training(train, test, faulty, monkeypatch, caplog):
    """As if only the classes of the training data had been chosen on the command line."""
    datasets = [dict(type='CityscapesDataset') | one for one in (train, test)]
    cfg = Config(
        dict(
            train_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=datasets[0])),
            test_dataloader=dict(dataset=datasets[1]),
        )
    )
    said = check(cfg, 'notebook', monkeypatch, caplog)
    assert ('test_dataloader.dataset.metainfo.classes is' in said) == faulty


@pytest.mark.parametrize(
    ('change', 'fault'),
    [
        ({}, "train_dataloader.dataset: 'flowers/train' has 3 folders of classes, but .*=2: set"),
        (dict(data_root='flowers/train', data_prefix=''), "'flowers/train' has 3 folders"),
        (dict(data_prefix=dict(img_path='train')), "'flowers/train' has 3 folders"),
        (dict(ann_file='train.txt'), ''),
        (dict(with_label=False), ''),
        (dict(type='ImageNet'), ''),
    ],
)
def test_more_folders_than_classes(change, fault, folder, monkeypatch, caplog):
    for name in ('a', 'b', 'c', '.hidden'):
        (folder / 'flowers/train' / name).mkdir(parents=True)
    (folder / 'flowers/train.txt').touch()
    dataset = dict(type='CustomDataset', data_root='flowers', data_prefix='train') | change
    loader = dict(dataset=dict(type='RepeatDataset', dataset=dataset))
    cfg = Config(dict(model=dict(head=dict(num_classes=2)), train_dataloader=loader))
    if fault:
        assert re.search(fault, check(cfg, 'browse_dataset', monkeypatch, caplog))
        with pytest.raises(ConfigOptionError, match=fault):
            check(cfg, 'train', monkeypatch, caplog)
        cfg.model.head.num_classes = 3
    assert 'folders' not in check(cfg, 'train', monkeypatch, caplog)


KEYPOINTS = [('nose', ''), ('left', 'right'), ('right', 'left')]


@pytest.mark.parametrize(
    ('change', 'fault'),
    [
        ({}, ''),
        (
            {'left': 'left'},
            "'right' has swap='left', but 'left' has swap='left': set that to 'right'",
        ),
        (
            {'right': ''},
            "'left' has swap='right', but 'right' has swap='right': set that to 'left'",
        ),
        ({'nose': 'nase'}, "'nose' has swap='nase', which is not the name of a keypoint"),
    ],
)
@pytest.mark.parametrize('in_file', [False, True])
def test_keypoints_are_swapped_on_both_sides(change, fault, in_file, folder, monkeypatch, caplog):
    swaps = dict(KEYPOINTS) | change
    points = {i: dict(name=name, swap=swap) for i, (name, swap) in enumerate(swaps.items())}
    info = dict(keypoint_info=points)
    if in_file:
        (folder / 'info.py').write_text(f'dataset_info = {info}')
        info = dict(from_file='info.py')
    cfg = Config(dict(train_dataloader=dict(dataset=dict(dataset=dict(metainfo=info)))))
    if not fault:
        assert 'swap' not in check(cfg, 'train', monkeypatch, caplog)
        return
    assert fault in check(cfg, 'browse_dataset', monkeypatch, caplog)
    with pytest.raises(ConfigOptionError, match=re.escape(f'dataset.metainfo: keypoint {fault}')):
        check(cfg, 'train', monkeypatch, caplog)


@pytest.mark.parametrize(
    ('option', 'value', 'fault'),
    [
        ('input_size', [96, 128], ''),
        ('input_size', (192, 256), 'pipeline.4.input_size=(96, 128), but model.head.decoder.input'),
        ('heatmap_size', (48, 64), 'pipeline.5.encoder.heatmap_size=(24, 32), but model.head.deco'),
        ('type', 'MSRAHeatmap', "pipeline.5.encoder.type='UDPHeatmap', but model.head.decoder.typ"),
    ],
)
def test_steps_fit_the_decoder(option, value, fault, folder, monkeypatch, caplog):
    cfg = load('td-hm_hrformer-demo_1xb16-2e_figures-96x128')
    cfg.model.head.decoder[option] = value
    assert fault in check(cfg, 'browse_dataset', monkeypatch, caplog)
    if not fault:
        return
    monkeypatch.setattr('mmhrformer.engine.config_check.missing_data', lambda *args: [])
    with pytest.raises(ConfigOptionError, match=re.escape(f'train_dataloader.dataset.{fault}')):
        check(cfg, 'train', monkeypatch, caplog)


def test_evaluators_read_the_annotations_of_the_data(folder, monkeypatch, caplog):
    cfg = load('td-hm_hrformer-demo_1xb16-2e_figures-96x128')
    assert 'evaluator' not in check(cfg, 'notebook', monkeypatch, caplog)
    cfg.val_evaluator = [dict(type='PCKAccuracy'), cfg.val_evaluator]
    cfg.val_dataloader.dataset.ann_file = 'other.json'
    said = check(cfg, 'notebook', monkeypatch, caplog)
    assert "_val.json', but val_dataloader.dataset reads 'data/demo/figures/other.json'" in said
    assert 'test_evaluator' not in said


@pytest.mark.parametrize(
    'loop', [dict(type='IterBasedTrainLoop', max_iters=9), dict(by_epoch=False, max_iters=9)]
)
def test_epochs_in_a_training_by_iterations(loop, folder, monkeypatch, caplog):
    """Such a schedule would never step, and such a hook save only at the end."""
    schedules = [
        dict(type='LinearLR', by_epoch=False),
        dict(type='MultiStepLR', milestones=[1]),
        dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True),
        dict(type='ReduceOnPlateauLR'),
    ]
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    cfg = Config(dict(train_cfg=loop, param_scheduler=schedules, default_hooks=hooks))
    said = check(cfg, 'train', monkeypatch, caplog)
    options = 'param_scheduler[1].by_epoch, default_hooks.checkpoint.by_epoch'
    assert f'their default: {options}. Set' in said
    cfg.train_cfg = dict(by_epoch=True, max_epochs=9)
    assert 'by_epoch' not in check(cfg, 'train', monkeypatch, caplog)
    cfg = load('ocrnet_hrformer-demo_1xb16-100_scenes-96x96')
    assert 'by_epoch' not in check(cfg, 'notebook', monkeypatch, caplog)


PIPELINES = 'train_dataloader.dataset.pipeline'
CODEC = "codec = dict(type='UDPHeatmap', input_size=(96, 96), heatmap_size=(24, 24), sigma=1)\n"


@pytest.mark.parametrize(
    ('base', 'text', 'places'),
    [
        (
            COCO,
            CODEC,
            [f'{PIPELINES}.6.input_size', f'{PIPELINES}.7.encoder', 'model.head.decoder'],
        ),
        (COCO, 'codec = dict(sigma=1)', [f'{PIPELINES}.7.encoder', 'model.head.decoder']),
        (COCO, "data_root = 'x'", ['val_dataloader.dataset.bbox_file', 'test_evaluator.ann_file']),
        (COCO, "data_mode = 'bottomup'", ['test_dataloader.dataset.data_mode']),
        (COCO, 'vis_backends = []', ['visualizer.vis_backends']),
        (
            CITYSCAPES,
            'crop_size = (64, 64)',
            [f'{PIPELINES}.3.crop_size', f'{PIPELINES}.6.size', 'model.data_preprocessor.size'],
        ),
        (CITYSCAPES, 'train_pipeline = _base_.train_pipeline[:3]', [PIPELINES]),
        (CITYSCAPES, "norm_cfg = dict(type='BN')", ['model.decode_head.1.norm_cfg']),
        (CITYSCAPES, 'class_weight = [1.0] * 19', ['model.decode_head.0.loss_decode.class_weight']),
    ],
)
def test_variables_changed_too_late_are_named_with_their_copies(base, text, places, folder):
    """Both in a config that inherits them and by --cfg-options."""
    file = folder / 'child.py'
    file.write_text(f'_base_ = [{str(find_config(base))!r}]\n{text}')
    cfg = Config.fromfile(file)
    ((key, remedy),) = dead_options(cfg).items()
    assert key == text.split(' =')[0]
    assert set(places) <= set(re.split('[:,] ', remedy))
    with pytest.raises(ValueError, match=rf'{key} has no effect: .*{places[0]}'):
        ConfigCheckVisBackend(save_dir='').add_config(cfg)
    by_option = load(base)
    by_option.merge_from_dict({key: cfg[key]})
    assert set(places) <= set(late_variables(by_option)[key])


@needs('mmpretrain', 'mmpose', 'mmseg')
def test_variables_of_stock_configs(folder):
    pose = 'mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-s_8xb256-420e_coco-256x192.py'
    seg = 'mmseg::hrnet/fcn_hr48_4xb2-80k_cityscapes-512x1024.py'
    late = {
        # Numbers that are also elsewhere in the config, such as val_interval=10.
        pose: dict(max_epochs=10, stage2_num_epochs=5, base_lr=0.05, codec=dict(sigma=1)),
        seg: dict(
            img_ratios=[0.25, 0.3],
            crop_size=(5, 5),
            data_preprocessor=dict(size=(9, 9)),
            dataset_type='X',
        ),
        'mmpretrain::resnet/resnet50_8xb32_in1k.py': dict(dataset_type='X', test_pipeline=[]),
    }
    for base, options in late.items():
        file = folder / 'child.py'
        file.write_text(f'_base_ = [{base!r}]\n')
        assert dead_options(Config.fromfile(file)) == late_variables(Config.fromfile(file)) == {}
        unknown = f'{file.read_text()}num_keypoints = 5\n'
        file.write_text(unknown + '\n'.join(f'{k} = {v!r}' for k, v in options.items()))
        dead = dead_options(Config.fromfile(file))
        assert dead.pop('num_keypoints') == ''
        assert set(dead) == set(options)
        assert all(dead.values())


@needs('mmpose', 'mmseg')
def test_what_is_computed_from_a_variable_is_followed(folder):
    """Through expressions and other variables, and in stock configs without false alarms."""
    file = folder / 'base.py'
    file.write_text(
        'side = 8\ntimes = 2\nsize = (side, side * 3)\nsteps = [dict(size=size)]\n'
        'train_dataloader = dict(dataset=dict(pipeline=steps), n=times + 1)\n'
    )
    assert dead_options(Config.fromfile(file)) == {}
    cfg = Config.fromfile(file)
    cfg.merge_from_dict(dict(side=3, times=5))
    sizes = 'train_dataloader.dataset.pipeline.0.size'
    places = dict(side=[f'{sizes}.0', f'{sizes}.1'], times=['train_dataloader.n'])
    assert late_variables(cfg) == places
    cfg.merge_from_dict({'train_dataloader.n': 6})
    assert 'times' not in late_variables(cfg)
    for stock in (
        'mmseg::maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py',  # optimizer
        'mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-t_8xb256-420e_aic-coco-256x192.py',
    ):
        file.write_text(f'_base_ = [{stock!r}]\n')
        assert dead_options(Config.fromfile(file)) == {}


@pytest.mark.parametrize('suffix', ['yml', 'json'])
def test_configs_that_are_no_python(suffix, folder):
    cfg = Config(dict(train_cfg=dict(max_epochs=3), max_epochs=3, rate=0.5))
    cfg.dump(folder / f'config.{suffix}')
    cfg = Config.fromfile(folder / f'config.{suffix}')
    assert dead_options(cfg) == dict(rate='')
    assert late_variables(cfg) == {}


@pytest.mark.parametrize(
    ('name', 'options', 'faults'),
    [
        (COCO, {}, []),
        (COCO, {'train_dataloader.dataset.pipeline.6.use_udp': True}, ['6.use_udp=True']),
        (COCO, {'model.head.decoder.type': 'SimCCLabel'}, []),
        (
            COCO,
            {'model.head.decoder.type': 'UDPHeatmap'},
            ['6.use_udp=False', *['2.use_udp=False'] * 2, 'shift_heatmap=True'],
        ),
        (DEMO, {}, []),
        (DEMO, {'model.test_cfg.shift_heatmap': True}, ['shift_heatmap=True']),
        (DEMO, {'val_dataloader.dataset.pipeline.2.use_udp': False}, ['2.use_udp=False']),
    ],
)
def test_coordinates_that_fit_the_heatmaps(name, options, faults):
    """Keypoints would be off by half a pixel of the input, too little for anyone to notice."""
    cfg = load(name)
    cfg.merge_from_dict(options)
    lines = biased_coordinates(cfg)
    assert len(lines) == len(faults)
    assert all(
        f'.{fault}, but model.head.decoder is a' in line for line, fault in zip(lines, faults)
    )


def test_half_changed_variables_are_told(folder, monkeypatch, caplog):
    file = folder / 'child.py'
    text = f'_base_ = [{str(find_config(COCO))!r}]\n{CODEC}model = dict(head=dict(decoder=codec))'
    file.write_text(text)
    said = check(Config.fromfile(file), 'notebook', monkeypatch, caplog)
    assert f'codec was changed, but these still have its old value: {PIPELINES}.6' in said
    (late,) = (line for line in said.splitlines() if line.startswith('codec was changed'))
    assert 'model.head.decoder' not in late
    assert f'the data do not fit the decoder:\n{PIPELINES}.6' in said


@pytest.mark.parametrize(
    ('change', 'differs'),
    [
        (dict(), False),
        (dict(type='mmpose.MSRAHeatmap'), False),
        (dict(type=type('MSRAHeatmap', (), {})), False),
        (dict(input_size=[192, 256]), False),
        (dict(type='UDPHeatmap'), True),
        (dict(input_size=(256, 192)), True),
    ],
    ids=str,
)
def test_codecs_are_compared_by_their_meaning(change, differs):
    codec = dict(type='MSRAHeatmap', input_size=(192, 256))
    step = dict(type='GenerateTarget', encoder={**codec, **change})
    loader = dict(dataset=dict(type='CocoDataset', pipeline=[step]))
    cfg = dict(model=dict(head=dict(decoder=codec)), train_dataloader=loader)
    assert bool(other_codecs(cfg)) == differs


def test_variables_of_a_flat_config(folder, monkeypatch, caplog):
    """Without base files to compare with, options of the same form are reported."""
    cfg = load(COCO)
    cfg.codec.sigma = 7
    cfg.dump(folder / 'flat.py')
    said = check(Config.fromfile(folder / 'flat.py'), 'notebook', monkeypatch, caplog)
    (line,) = [line for line in said.splitlines() if line.startswith('Used instead of codec')]
    assert f'{PIPELINES}.7.encoder' in line
    assert 'model.head.decoder' in line


@pytest.mark.parametrize(
    ('options', 'processes', 'tool', 'said'),
    [
        ({}, 1, 'train', 'add --cfg-options optim_wrapper.type=OptimWrapper'),
        ({'optim_wrapper.dtype': 'bfloat16'}, 1, 'train', 'and remove optim_wrapper.dtype'),
        ({'optim_wrapper.type': 'OptimWrapper'}, 1, 'train', ''),
        ({}, 1, 'test', ''),
        ({'optim_wrapper.type': 'OptimWrapper'}, 2, 'train', 'CPUDistributedDataParallel'),
        ({}, 2, 'test', 'CPUDistributedDataParallel'),
        (
            {
                'optim_wrapper.type': 'OptimWrapper',
                'model_wrapper_cfg.type': 'mmhrformer.CPUDistributedDataParallel',
            },
            2,
            'train',
            '',
        ),
    ],
)
def test_what_needs_a_gpu_is_said_first(
    monkeypatch, folder, caplog, options, processes, tool, said
):
    cfg = load(COCO)
    cfg.merge_from_dict(options)
    for device, problem in (('cpu', said), ('mps', said), ('cuda', '')):
        monkeypatch.setattr('mmhrformer.engine.config_check.get_device', lambda name=device: name)
        found = needs_gpu(cfg, processes, training=tool == 'train')
        assert (problem in found) if problem else (found == '')
        assert '\n' not in found
    monkeypatch.setattr('mmhrformer.engine.config_check.get_device', lambda: 'cpu')
    monkeypatch.setattr('mmhrformer.engine.config_check.get_world_size', lambda: processes)
    with pytest.raises(FileNotFoundError, match=f'(?s)data are missing.*{re.escape(said)}'):
        check(cfg, tool, monkeypatch, caplog)
    monkeypatch.setattr('mmhrformer.engine.config_check.missing_data', lambda *args: [])
    if said:
        with pytest.raises(ValueError, match=re.escape(said)):
            check(cfg, tool, monkeypatch, caplog)
    else:
        check(cfg, tool, monkeypatch, caplog)
    if tool == 'train':
        assert said in check(cfg, 'notebook', monkeypatch, caplog)


@pytest.mark.parametrize(
    ('gpus', 'options', 'images'),
    [
        (8, {}, None),
        (1, {'train_dataloader.batch_size': 8}, None),
        (2, {'optim_wrapper.accumulative_counts': 4}, None),
        (4, {}, 'batch size is 4 (4 processes x 1)'),
        (1, {'optim_wrapper.accumulative_counts': 2}, 'batch size is 2 (1 processes x 1 x 2 acc'),
        (1, {'auto_scale_lr.enable': True}, None),
        (
            1,
            {'auto_scale_lr.enable': True, 'optim_wrapper.accumulative_counts': 8},
            'does not count optim_wrapper.accumulative_counts=8, which makes them 8',
        ),
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


@pytest.mark.parametrize(
    ('name', 'options', 'said'),
    [
        (IMAGENET, {}, ''),
        (IMAGENET, {'train_cfg.max_epochs': 100}, '=100, but param_scheduler.end=300, which train'),
        (IMAGENET, {'train_cfg.max_epochs': 100, 'param_scheduler.end': 100}, ''),
        (IMAGENET, {'train_cfg.max_epochs': 400}, '=400, but the last schedule ends at 300, and'),
        (COCO, {'train_cfg.max_epochs': 100}, 'param_scheduler[1].milestones=[170, 200] with end='),
        (COCO, {'train_cfg.max_epochs': 205}, ''),
        (COCO, {'param_scheduler.1.end': 190}, 'milestones=[170, 200] with end=190, which trai'),
        (CITYSCAPES, {}, ''),
        (CITYSCAPES, {'train_cfg.max_iters': 40000}, 'param_scheduler[1].end=80001, which train'),
        (CITYSCAPES, {'train_cfg.max_iters': 160000}, 'ends at 80001, and the rate stays constant'),
        (CITYSCAPES, {'param_scheduler': []}, ''),
        (CITYSCAPES, {'param_scheduler': [dict(type='LinearLR', by_epoch=False, end=500)]}, ''),
        (CITYSCAPES, {'param_scheduler': [dict(type='PolyLR', by_epoch=False)]}, ''),
    ],
)
def test_schedules_of_another_length(name, options, said, monkeypatch, caplog):
    cfg = load(name)
    for key in set(options) & set(cfg):
        setattr(cfg, key, options.pop(key))
    cfg.merge_from_dict(options)
    warning = other_length(cfg)
    assert said in warning
    assert bool(said) == bool(warning)
    assert warning in check(Config(dict(cfg, train_dataloader=None)), 'browse', monkeypatch, caplog)


def test_accumulation_in_a_training_by_iterations():
    cfg = load(CITYSCAPES)
    assert accumulated_iterations(cfg) == ''
    cfg.optim_wrapper.accumulative_counts = 8
    assert 'max_iters=80000 are 10000 steps of the optimizer' in accumulated_iterations(cfg)
    cfg = load(IMAGENET)
    cfg.optim_wrapper.accumulative_counts = 8  # epochs remain epochs
    assert accumulated_iterations(cfg) == ''

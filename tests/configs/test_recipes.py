"""The recipes of the shipped configs are the official ones, as schedule.json records them."""

from __future__ import annotations

import json
import re
from functools import cache

import golden
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS
from needs import may_need
from torch import nn

from mmhrformer.configs import config_root

pytestmark = may_need('mmpose', 'mmseg')

ALL = {
    path.stem: path
    for path in sorted(config_root().glob('hrformer_*/*.py'))
    if 'test-dev' not in path.stem and path.parent.name != 'hrformer_det'
}
SCHEDULE = golden.read_json('schedule.json')
RECIPES = {
    'in1k': SCHEDULE['classification'],
    'coco': SCHEDULE['pose'],
    'cityscapes': SCHEDULE['segmentation']['cityscapes'],
    'pascal-context-59': SCHEDULE['segmentation']['pascal_context'],
    'coco-stuff10k': SCHEDULE['segmentation']['coco_stuff'],
    'ade20k': SCHEDULE['segmentation']['ade20k'],
}
SEG = SCHEDULE['segmentation']['common']


def load(name: str) -> Config:
    return golden.read_config(ALL[name])


def data_of(name: str) -> str:
    """The dataset that a config is for."""
    return re.search(r'_(in1k|coco-stuff10k|coco|cityscapes|pascal-context-59|ade20k)', name)[1]


def arch_of(name: str) -> tuple[str, int]:
    """Architecture and window that the name of a config says."""
    arch, window = re.search(r'hrformer-(tiny|small|base)(?:-w(\d+))?_', name).groups()
    return arch, int(window or 7)


def iterations_per_epoch(name: str) -> int:
    return {'in1k': 1251, 'coco': 586}.get(data_of(name), 0)


@cache
def learning_rates(schedule: str, lr: float, epoch: int, steps: frozenset[int]) -> dict:
    """Step the schedulers of a config through a run, as mmengine's runner does."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedulers = [
        PARAM_SCHEDULERS.build(o, default_args=dict(optimizer=optimizer, epoch_length=epoch))
        for o in json.loads(schedule)
    ]
    optimizer.step()
    seen = {}
    for step in range(max(steps) + 1):
        if step in steps:
            seen[step] = optimizer.param_groups[0]['lr']
        for scheduler in schedulers:
            if not scheduler.by_epoch or (step + 1) % epoch == 0:
                scheduler.step()
    return seen


@pytest.mark.parametrize('name', ALL)
def test_learning_rate_along_the_run(name):
    cfg, recipe = load(name), RECIPES[data_of(name)]
    if data_of(name) == 'in1k':
        samples = recipe['lr']['samples_update_lr']
    else:
        samples = recipe.get('lr_samples') or recipe['lr']['samples_iteration_lr']
    if data_of(name) == 'coco':  # the last iteration before the step at epoch 200
        samples = [*samples, (200 * iterations_per_epoch(name) - 1, 5e-5)]
    options = cfg.param_scheduler
    schedule = json.dumps(options if isinstance(options, list) else [options])
    lr, epoch = cfg.optim_wrapper.optimizer.lr, iterations_per_epoch(name)
    seen = learning_rates(schedule, lr, epoch, frozenset(step for step, _ in samples))
    assert seen == pytest.approx(dict(samples), rel=1e-8, abs=0)


@pytest.mark.parametrize('name', ALL)
def test_length_of_the_training(name):
    cfg, recipe = load(name), RECIPES[data_of(name)]
    if data_of(name) == 'in1k':
        assert cfg.train_cfg.max_epochs == recipe['epochs'] == 300
    elif data_of(name) == 'coco':
        assert cfg.train_cfg.max_epochs == 210
        assert '210 epochs' in recipe['lr']['policy']
    else:
        assert cfg.train_cfg.max_iters == recipe['max_iters']


@pytest.mark.parametrize('name', ALL)
def test_total_batch_is_what_the_name_says_and_the_official_one(name):
    cfg, recipe = load(name), RECIPES[data_of(name)]
    gpus, batch = map(int, re.search(r'_(\d+)xb?(\d+)', name).groups())
    assert cfg.train_dataloader.batch_size == batch
    assert cfg.auto_scale_lr.base_batch_size == gpus * batch
    official = recipe['total_batch']
    if data_of(name) == 'coco':
        arch, size = arch_of(name)[0], name.split('-')[-1]
        official = official[f'{arch.replace("tiny", "small")}_{size}']
    total = official if isinstance(official, int) else int(re.match(r'\d+', official)[0])
    assert gpus * batch == total


@pytest.mark.parametrize('name', ALL)
def test_drop_path(name):
    arch, window = arch_of(name)
    recipe = RECIPES[data_of(name)]['drop_path']
    if data_of(name) == 'in1k':
        official = recipe[arch]
    elif data_of(name) == 'coco':
        # No official config of the tiny one: the small one's recipe.
        official = recipe[f'{arch.replace("tiny", "small")}_{name.split("-")[-1]}']
    else:
        # Window 15 on ADE20K has no official script; its window 13 stands in.
        key = {'small': 'small'}.get(arch, f'base_w{window}')
        official = recipe.get(key, recipe.get('base_w13'))
    backbone = load(name).model.backbone
    assert backbone.drop_path_rate == official
    assert (backbone.arch, backbone.get('window_size', 7)) == (arch, window)


@pytest.mark.parametrize('name', ALL)
def test_weights_to_start_from(name):
    init = load(name).model.backbone.get('init_cfg')
    if data_of(name) == 'in1k':
        assert init is None
    else:
        assert init.type == 'Pretrained'
        assert init.checkpoint == f'mmhrformer://hrformer-{arch_of(name)[0]}_8xb128_in1k'
        assert init.checkpoint.split('//')[1] in ALL


@pytest.mark.parametrize('name', ALL)
def test_optimizer(name):
    cfg, recipe = load(name), RECIPES[data_of(name)]
    official = recipe.get('optimizer') or SEG['optimizer']
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.type == official['type'].split()[0] == 'AdamW'
    rate = official['lr']
    assert optimizer.lr == (rate if isinstance(rate, float) else 5e-4 * 1024 / 512)
    assert optimizer.weight_decay == official['weight_decay']
    assert list(optimizer.betas) == official['betas']
    assert optimizer.eps == 1e-8
    clip = cfg.optim_wrapper.get('clip_grad')
    assert clip == (dict(max_norm=5.0) if data_of(name) == 'in1k' else None)


MEMBERS = [
    ('hrformer-small_8xb128_in1k', 'keys_cls_small.json'),
    ('td-hm_hrformer-small_8xb32-210e_coco-256x192', 'keys_pose_small.json'),
    ('ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024', 'keys_seg_small_w7.json'),
]


@pytest.mark.parametrize(('name', 'keys'), MEMBERS, ids=['cls', 'pose', 'seg'])
def test_every_parameter_is_in_its_official_decay_group(name, keys):
    cfg = load(name)
    cfg.optim_wrapper.type = 'OptimWrapper'
    model = golden.build(ALL[name])
    options = dict(cfg.optim_wrapper)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type=options.pop('constructor'),
            paramwise_cfg=options.pop('paramwise_cfg'),
            optim_wrapper_cfg=options,
        )
    )
    optimizer = constructor(model).optimizer
    decayed = {
        id(p): torch.full_like(p, float(group['weight_decay'] > 0))
        for group in optimizer.param_groups
        for p in group['params']
    }
    assert len(decayed) == len(list(model.parameters()))
    named = {n: decayed[id(p)] for n, p in model.named_parameters()}
    groups = golden.by_official_name(named, golden.official_state_dict(keys))
    layers = layer_kinds(model, named, keys)
    task = name.split('_')[0].split('-')[0]
    for key, value in groups.items():
        table, vector = key.endswith('bias_table'), value.ndim <= 1
        official = {
            'hrformer': not vector,
            'td': not table,
            'ocrnet': key in layers,
        }[task]
        assert value.unique().tolist() == [float(official)], key
    if task == 'ocrnet':
        counts = SEG['no_weight_decay']
        assert f'{len(layers)} decayed and {len(groups) - len(layers)} non-decayed' in counts


def layer_kinds(model: nn.Module, named: dict, keys: str) -> set[str]:
    """Official names of the weights of convolutions and linear layers."""
    kinds = {
        f'{name}.weight'
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    marks = {name: torch.full_like(value, float(name in kinds)) for name, value in named.items()}
    official = golden.by_official_name(marks, golden.official_state_dict(keys))
    return {key for key, mark in official.items() if mark.flatten()[0] == 1}


def transforms(pipeline) -> dict[str, dict]:
    return {t['type'].split('.')[-1]: t for t in pipeline}


SEG_NAMES = [name for name in ALL if name.startswith('ocrnet')]


@pytest.mark.parametrize('name', SEG_NAMES)
def test_segmentation_data_and_losses(name):
    cfg, recipe = load(name), RECIPES[data_of(name)]
    pipeline = cfg.train_dataloader.dataset.pipeline
    steps = transforms(pipeline)
    width, height = recipe['crop_wh']
    crop = (height, width)
    assert tuple(steps['RandomCrop']['crop_size']) == crop
    assert steps['RandomCrop'].get('cat_max_ratio', 1.0) == 1.0
    assert tuple(steps['PlaceRandomly']['size']) == crop
    assert tuple(cfg.model.data_preprocessor.size) == crop
    assert tuple(steps['RandomScaleAspect']['scale_range']) == (0.5, 2.0)
    assert tuple(steps['RandomScaleAspect']['aspect_range']) == (0.9, 1.1)
    assert steps['RandomFlip']['prob'] == SCHEDULE['segmentation']['augmentation']['random_hflip']
    assert steps['RandomBrightness']['shift'] == 10
    ours = [kind for kind in steps if kind in SEG_STEPS]
    order = 'order_cityscapes' if data_of(name) == 'cityscapes' else 'order_others'
    official = SCHEDULE['segmentation']['augmentation'][order]
    assert [SEG_STEPS[kind] for kind in ours] == [step.split(' ')[0] for step in official]
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.bgr_to_rgb is False
    assert preprocessor.mean == [123.675, 116.28, 103.53]
    assert preprocessor.std == [58.395, 57.12, 57.375]
    assert tuple(steps['PlaceRandomly']['pad_val']) == tuple(preprocessor.mean)
    aux, ocr = cfg.model.decode_head
    assert aux.num_classes == ocr.num_classes == recipe['num_classes']
    assert aux.loss_decode.loss_weight == 0.4
    ohem = 'auxohemce' in recipe['loss']
    kind = 'OHEMCrossEntropyLoss' if ohem else 'WeightedCrossEntropyLoss'
    assert ocr.loss_decode.type == f'mmhrformer.{kind}'
    if ohem:
        assert (ocr.loss_decode.thresh, ocr.loss_decode.min_kept) == (0.9, 100000)
    weighted = 'class weights' in recipe['loss']
    official = golden.read_json('losses.json')['official_settings_per_dataset']['cityscapes']
    for head in (aux, ocr):
        weights = head.loss_decode.get('class_weight')
        assert weights == (official['ce_weight'] if weighted else None)


# Transform -> its name in schedule.json.
SEG_STEPS = {
    'RandomScaleAspect': 'random_resize',
    'RandomCrop': 'random_crop',
    'RandomFlip': 'random_hflip',
    'RandomBrightness': 'random_brightness',
    'Resize': 'resize',
}


@pytest.mark.parametrize('name', SEG_NAMES)
def test_segmentation_test_sizes_and_scales(name):
    cfg = load(name)
    official = SCHEDULE['segmentation']['test']
    steps = transforms(cfg.test_dataloader.dataset.pipeline)
    if data_of(name) == 'cityscapes':
        assert 'Resize' not in steps
    else:
        assert min(steps['Resize']['scale']) == 520
        assert steps['Resize']['interpolation'] == 'bicubic'
        train = transforms(cfg.train_dataloader.dataset.pipeline)
        assert train['Resize'] == steps['Resize'] == transforms(cfg.tta_pipeline)['Resize']
    padding = cfg.model.data_preprocessor.get('test_cfg')
    assert padding == (dict(size_divisor=8) if data_of(name) == 'ade20k' else None)
    assert cfg.model.test_cfg.mode == 'whole'
    scales, flips, *_ = transforms(cfg.tta_pipeline)['TestTimeAug']['transforms']
    seven = name.startswith('ocrnet_hrformer-base-w15') and data_of(name) == 'cityscapes'
    expected = (
        official['scales']['7-scale jsons exist for every data set'] if seven else [0.75, 1.0, 1.25]
    )
    assert [scale['scale_factor'] for scale in scales] == expected
    assert [flip['prob'] for flip in flips] == [0.0, 1.0]


@pytest.mark.parametrize('name', [name for name in ALL if data_of(name) == 'coco'])
def test_pose_data(name):
    cfg, recipe = load(name), SCHEDULE['pose']
    size = name.split('-')[-1]
    height, width = map(int, size.split('x'))
    train = transforms(cfg.train_dataloader.dataset.pipeline)
    test = transforms(cfg.test_dataloader.dataset.pipeline)
    codec = train['GenerateTarget']['encoder']
    assert train['TopdownAffine']['input_size'] == test['TopdownAffine']['input_size']
    assert tuple(codec.input_size) == tuple(train['TopdownAffine']['input_size']) == (width, height)
    assert list(codec.heatmap_size) == recipe['heatmap'][size]['size_wh']
    assert codec.sigma == recipe['heatmap'][size]['sigma']
    assert cfg.model.head.decoder == codec
    # In the official code the dataset shifts the boxes: by 0.4 * (rand - 0.5) of their sides, which
    # are without the padding of 1.25, and before any other augmentation.
    assert list(train)[1:4] == ['GetBBoxCenterScale', 'RandomBoxShift', 'RandomFlip']
    shift = train['RandomBoxShift']
    assert (1.25 * shift['shift'], shift['prob']) == (pytest.approx(0.2), 0.3)
    assert 'RandomBoxShift' not in test
    spread = train['RandomScaleRotation']
    assert (spread['scale_std'], spread['rotation_std'], spread['rotation_prob']) == (0.5, 40, 0.6)
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.bgr_to_rgb is True
    for ours, official in (('mean', 'mean'), ('std', 'std')):
        scaled = [255 * value for value in recipe['input'][official]]
        assert list(preprocessor[ours]) == pytest.approx(scaled, abs=1e-3)
    assert cfg.model.test_cfg == dict(flip_test=True, flip_mode='heatmap', shift_heatmap=True)
    assert 'AP_H_56' in cfg.test_dataloader.dataset.bbox_file
    assert 'AP_H_56' in recipe['test']['boxes']
    assert cfg.model.head.loss.use_target_weight


@pytest.mark.parametrize('name', [name for name in ALL if data_of(name) == 'in1k'])
def test_classification_data(name):
    cfg, recipe = load(name), SCHEDULE['classification']
    steps = transforms(cfg.train_dataloader.dataset.pipeline)
    assert cfg.train_dataloader.drop_last
    assert steps['RandomResizedCrop']['scale'] == 224
    assert steps['RandomResizedCrop']['interpolation'] == 'bicubic'
    assert steps['RandomFlip']['prob'] == recipe['augmentation']['hflip']
    augment = steps['RandAugment']
    assert (augment['magnitude_level'], augment['magnitude_std']) == (9, 0.5)
    assert (augment['policies'], augment['num_policies']) == ('timm_increasing', 2)
    erasing = recipe['augmentation']['random_erasing']
    assert steps['RandomErasing']['erase_prob'] == erasing['prob']
    assert steps['RandomErasing']['mode'] == 'rand'
    mixup, cutmix = cfg.model.train_cfg.augments
    assert mixup == dict(type='Mixup', alpha=recipe['augmentation']['mixup_alpha'])
    assert cutmix == dict(type='CutMix', alpha=recipe['augmentation']['cutmix_alpha'])
    assert cfg.model.head.loss.label_smooth_val == recipe['label_smoothing']
    test = transforms(cfg.test_dataloader.dataset.pipeline)
    assert (test['ResizeEdge']['scale'], test['CenterCrop']['crop_size']) == (256, 224)

"""Shipped recipes with what fits them to a CPU: a small architecture, few images, few steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tiny_datasets import make
from training_steps import shrink

from mmhrformer import HRFormer
from mmhrformer.checkpoints import to_dialect
from mmhrformer.configs import find_config, read_config

MICRO = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
# All are interrupted after 2 epochs or iterations; two iterations make an epoch. Metrics of hardly
# trained models are 0 or nearly so: predictions are kept, too.
SHORT = """
optim_wrapper = dict(type='OptimWrapper')
randomness = dict(seed=0)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
train_cfg = dict({length}, val_interval=2)
train_dataloader = dict({loader})
val_dataloader = dict({loader})
test_dataloader = dict({loader})
val_evaluator = [_base_.val_evaluator, dict(type='DumpResults', out_file_path='val.pkl')]
test_evaluator = [_base_.test_evaluator, dict(type='DumpResults', out_file_path='test.pkl')]
"""
# What is added to the first run, which is killed at its first checkpoint.
KILLED = """
_base_ = ['journey.py']
custom_imports = dict(imports=['mmhrformer', 'kill_hook'])
default_hooks = dict(kill=dict(type='KillHook'))
"""
EPOCHS = SHORT.format(length='max_epochs=5', loader='num_workers=1, batch_size=2')
ITERATIONS = SHORT.format(length='max_iters=4', loader='num_workers=1')


@dataclass(frozen=True)
class Task:
    """Common options of all recipes of a task.

    Args:
        metric (str): The main metric of the evaluator.
        unit (str): What the schedule counts, ``'epoch'`` or ``'iter'``.
        schedule (str): The shortened schedule, as Python of a config.
        factors (tuple): The learning rate of each iteration in units of the highest.
        model (str): The model that fits the small architecture, as Python of a config.
        size (tuple): Height and width of an image; half of a photograph's for segmentation.
    """

    metric: str
    unit: str
    schedule: str
    factors: tuple[float, ...]
    model: str
    size: tuple[int, int] = (224, 224)


CLS = Task(
    metric='accuracy/top1',
    unit='epoch',
    schedule=EPOCHS + 'param_scheduler = dict(end=5, warmup=3)\n',
    factors=(
        *(1e-3 + (1 - 1e-3) * k / 6 for k in range(6)),
        *(1e-2 + (1 - 1e-2) * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(6, 10)),
    ),
    model="""
model = dict(
    backbone=dict(arch={arch}),
    neck=[dict(_base_.model.neck[0], in_channels={channels}), _base_.model.neck[1]],
)
""",
)
POSE = Task(
    metric='coco/AP',
    unit='epoch',
    schedule=EPOCHS
    + """
param_scheduler = [
    dict(_base_.param_scheduler[0], end=4),
    dict(_base_.param_scheduler[1], end=5, milestones=[3, 4]),
]
""",
    factors=(*(1e-3 + (1 - 1e-3) * k / 3 for k in range(3)), *[1] * 3, *[0.1] * 2, *[0.01] * 2),
    model="""
model = dict(
    backbone=dict(arch={arch}, init_cfg=dict(checkpoint='mmhrformer://{weights}')),
    head=dict(in_channels={channels}[0]),
)
""",
    size=(256, 192),
)
SEG = Task(
    metric='mIoU',
    unit='iter',
    schedule=ITERATIONS
    + """
param_scheduler = [
    dict(_base_.param_scheduler[0], end=3),
    dict(_base_.param_scheduler[1], begin=2, end=5),
]
""",
    factors=(1e-6, (1 + 1e-6) / 2, 1, 0.5**0.9),
    model="""
model = dict(
    backbone=dict(arch={arch}, init_cfg=dict(checkpoint='mmhrformer://{weights}')),
    decode_head=[
        dict(_base_.model.decode_head[0], in_channels={channels}, channels=32),
        dict(_base_.model.decode_head[1], in_channels={channels}, channels=32, ocr_channels=16),
    ],
)
""",
    size=(128, 256),
)
# Hardly trained detectors find nothing of a higher score than 0.05.
RETINANET = replace(
    POSE,
    metric='coco/bbox_mAP',
    model="""
model = dict(
    backbone=dict(arch={arch}, init_cfg=dict(checkpoint='mmhrformer://{weights}')),
    neck=dict(in_channels=[*{channels}[1:]], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16),
    test_cfg=dict(score_thr=0),
)
""",
)
MASK_RCNN = replace(
    RETINANET,
    model="""
model = dict(
    backbone=dict(arch={arch}, init_cfg=dict(checkpoint='mmhrformer://{weights}')),
    neck=dict(in_channels=[*{channels}], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16),
    ),
    test_cfg=dict(rcnn=dict(score_thr=0)),
)
""",
)


@dataclass(frozen=True)
class Recipe:
    """A shipped config.

    Args:
        config (str): Its name.
        data (str): A key of ``tiny_datasets.DATASETS``.
        task (Task): The task.
        train (str): The command that trains, with the config in it.
        derived (bool): Whether only the architecture is replaced, in a config as users write them.
            Defaults to True; False: the whole config is written anew, with blocks or a backbone
            that the small architecture does not have.
        slow (bool): Whether ``make test`` leaves it out. Defaults to True.
    """

    config: str
    data: str
    task: Task
    train: str = 'tools/train.py CONFIG'
    derived: bool = True
    slow: bool = True


WHOLE = {
    'cls': Recipe(
        'hrformer-small_8xb128_in1k',
        'imagenet',
        CLS,
        '-m mim train mmhrformer CONFIG --gpus 0',
        slow=False,
    ),
    'pose': Recipe(
        'td-hm_hrformer-small_8xb32-210e_coco-256x192', 'coco', POSE, 'STOCK CONFIG', slow=False
    ),
    'seg': Recipe(
        'ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024', 'cityscapes', SEG, slow=False
    ),
    'seg-520x520': Recipe(
        'ocrnet_hrformer-small_8xb2-60k_pascal-context-59-520x520',
        'pascal_context',
        SEG,
        'STOCK CONFIG',
    ),
}
# One of each kind; test_steps.py and test_ablations.py train a step of every config.
OTHERS = {
    recipe.config: recipe
    for recipe in (
        Recipe('hrformer-base_32xb32_in1k', 'imagenet', CLS, '-m mmhrformer train CONFIG'),
        Recipe('td-hm_hrformer-base_8xb8-210e_coco-384x288', 'coco', POSE),
        Recipe('ocrnet_hrformer-small_8xb2-60k_coco-stuff10k-520x520', 'coco_stuff10k', SEG),
        Recipe('ocrnet_hrformer-base-w13_8xb2-150k_ade20k-520x520', 'ade20k', SEG),
        Recipe('retinanet_hrformer-tiny_fpn_8xb2-12e_coco', 'coco', RETINANET, 'STOCK CONFIG'),
        Recipe('mask-rcnn_hrformer-small_hrfpn_8xb2-12e_coco', 'coco', MASK_RCNN),
        Recipe('ocrnet-v3_hrformer-base-w13_8xb2-150k_ade20k-520x520', 'ade20k', SEG),
        Recipe('ocrnet_hrformer-base-w15-13-11-9_8xb1-80k_cityscapes-512x1024', 'cityscapes', SEG),
        Recipe('hrnet-tiny_8xb128_in1k', 'imagenet', CLS, 'STOCK CONFIG', derived=False),
        *(
            Recipe(name, data, task, derived=False)
            for name, data, task in (
                ('swin-tiny-dwconv_8xb128_in1k', 'imagenet', CLS),
                ('intrawin-tiny_8xb128_in1k', 'imagenet', CLS),
                ('hrformer-tiny-shifted_8xb128_in1k', 'imagenet', CLS),
                ('td-hm_hrnet-tiny_8xb32-210e_coco-256x192', 'coco', POSE),
                ('td-hm_hrformer-tiny-no-dwconv_8xb32-210e_coco-256x192', 'coco', POSE),
                ('td-hm_swin-base_8xb32-210e_coco-256x192', 'coco', POSE),
                ('td-hm_deit-base_8xb32-210e_coco-256x192', 'coco', POSE),
                ('td-hm_vit-large_8xb32-210e_coco-256x192', 'coco', POSE),
                ('ocrnet_hrnet-tiny_8xb2-60k_pascal-context-59-520x520', 'pascal_context', SEG),
            )
        ),
    )
}
RECIPES = WHOLE | OTHERS


def write_weights(file: Path) -> None:
    """An official ImageNet checkpoint of the small architecture, to start from."""
    torch.manual_seed(0)
    backbone = {f'backbone.{k}': v for k, v in HRFormer(MICRO).state_dict().items()}
    torch.save({'model': to_dialect(backbone, 'official', 'cls')}, file)


def write_small(recipe: Recipe, file: Path) -> Path:
    """The whole config with a small model that starts from nothing."""
    cfg = read_config(find_config(recipe.config))
    shrink(cfg)
    cfg.model.backbone.init_cfg = None
    cfg.dump(file)
    return file


def write_config(recipe: Recipe, folder: Path) -> Path:
    """Write data, and a config that trains on them.

    Args:
        recipe (Recipe): What is to be trained.
        folder (Path): Where; the data come into ``data``.

    Returns:
        Path: The config. ``killed.py`` beside it stops at its first checkpoint.
    """
    (folder / 'killed.py').write_text(KILLED)
    make(recipe.data, folder / 'data')
    base, model = find_config(recipe.config), ''
    if recipe.derived:
        write_weights(folder / 'hrt_micro.pth')
        # The base has a name there, which cannot be merged with a dict.
        arch = dict(_delete_=True, **MICRO)
        model = recipe.task.model.format(
            arch=arch, channels=MICRO['channels'], weights=folder / 'hrt_micro.pth'
        )
    else:
        base = write_small(recipe, folder / 'small.py')
    config = folder / 'journey.py'
    config.write_text(f'_base_ = [{str(base)!r}]\n{recipe.task.schedule}{model}')
    return config

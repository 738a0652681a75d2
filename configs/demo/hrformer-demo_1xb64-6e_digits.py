# Classify scikit-learn's handwritten digits. `make demo` writes the data.
_base_ = ['../_base_/models/hrformer_demo.py', '../_base_/runtime/cls.py']

data_root = 'data/demo/digits'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmhrformer.HRFormer', arch=_base_.arch, window_size=4),
    neck=[
        dict(
            type='mmhrformer.HRFormerFusion',
            in_channels=(16, 32, 48, 64),
            mid_channels=(8, 16, 32, 64),
            out_channels=256,
        ),
        dict(type='GlobalAveragePooling'),
    ],
    head=dict(type='LinearClsHead', num_classes=10, in_channels=256, topk=(1,)),
)
data_preprocessor = dict(
    num_classes=10, mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=2),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset', data_root=data_root, data_prefix='train', pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset', data_root=data_root, data_prefix='val', pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmhrformer.DecayGroupsConstructor',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(no_decay=['vectors']),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = dict(
    type='mmhrformer.WarmupCosineLR',
    warmup=1,
    start_factor=1e-2,
    end=6,
    end_factor=1e-2,
    by_epoch=True,
    convert_to_iter_based=True,
)
train_cfg = dict(by_epoch=True, max_epochs=6, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(logger=dict(interval=5))
randomness = dict(seed=0)

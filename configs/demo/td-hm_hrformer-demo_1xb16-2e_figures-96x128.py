# Estimate the poses of drawn people, in COCO format. `make demo` draws the data.
_base_ = [
    '../_base_/models/hrformer_demo.py',
    '../_base_/models/hrformer_pose.py',
    '../_base_/runtime/pose.py',
]

# mmpose's own inferencers look for these two names at the top of a config.
dataset_type = 'CocoDataset'
data_mode = 'topdown'
data_root = 'data/demo/figures/'
# Heatmaps are small here: unbiased coordinates and narrow peaks make the most of them.
codec = dict(type='UDPHeatmap', input_size=(96, 128), heatmap_size=(24, 32), sigma=1)
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, **_base_.arch),
        drop_path_rate=0.0,
        norm_cfg=dict(type='BN'),
        init_cfg=None,
    ),
    head=dict(in_channels=16, decoder=codec),
    test_cfg=dict(shift_heatmap=False),
)

train_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='RandomFlip', direction='horizontal'),
    dict(type='RandomBBoxTransform', shift_prob=0.0, scale_factor=(0.85, 1.15), rotate_factor=20),
    dict(type='TopdownAffine', input_size=codec['input_size'], use_udp=True),
    dict(type='GenerateTarget', encoder=codec),
    dict(type='PackPoseInputs'),
]
val_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=codec['input_size'], use_udp=True),
    dict(type='PackPoseInputs'),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_mode=data_mode,
        ann_file='annotations/person_keypoints_train.json',
        data_prefix=dict(img='train/'),
        indices=1680,  # people, out of 1,980
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_mode=data_mode,
        ann_file='annotations/person_keypoints_val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=val_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric', ann_file=data_root + 'annotations/person_keypoints_val.json'
)
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmhrformer.DecayGroupsConstructor',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.01),
    paramwise_cfg=dict(no_decay=['bias_tables']),
)
param_scheduler = dict(
    type='mmhrformer.WarmupCosineLR',
    warmup=0.2,
    start_factor=1e-2,
    end=2,
    end_factor=1e-2,
    by_epoch=True,
    convert_to_iter_based=True,
)
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=1))
randomness = dict(seed=0)

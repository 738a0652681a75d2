# Segment drawn landscapes, in mmsegmentation's format. `make demo` draws the data.
_base_ = [
    '../_base_/models/hrformer_demo.py',
    '../_base_/models/hrformer_ocr.py',
    '../_base_/runtime/seg.py',
]

data_root = 'data/demo/scenes/'
metainfo = dict(
    classes=('sky', 'mountain', 'water', 'grass', 'road', 'tree', 'house', 'car'),
    palette=[
        [135, 190, 235], [150, 130, 150], [40, 100, 190], [130, 200, 80],
        [110, 110, 115], [25, 105, 50], [235, 150, 60], [215, 30, 60],
    ],
)  # fmt: skip
crop_size = (96, 96)
norm_cfg = dict(type='BN')
aux_head, ocr_head = _base_.model.decode_head
for head in (aux_head, ocr_head):
    head.update(in_channels=(16, 32, 48, 64), channels=64, num_classes=8, norm_cfg=norm_cfg)
ocr_head.update(ocr_channels=32)
ocr_head.loss_decode.update(min_kept=10000)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch=dict(_delete_=True, **_base_.arch),
        drop_path_rate=0.0,
        norm_cfg=norm_cfg,
        init_cfg=None,
    ),
    decode_head=[aux_head, ocr_head],
)
del head, aux_head, ocr_head

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path='img_dir/train', seg_map_path='ann_dir/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path='img_dir/val', seg_map_path='ann_dir/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmhrformer.DecayGroupsConstructor',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.01),
    paramwise_cfg=dict(no_decay=['vectors', 'bias_tables']),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=11),
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=10, end=100),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=100, val_interval=50)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=50))
randomness = dict(seed=0)

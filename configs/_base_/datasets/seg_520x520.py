# Shared by PASCAL-Context, COCO-Stuff and ADE20K: images are resized to a shorter side of 520 pixels,
# crops are 520x520.
crop_size = (520, 520)

# The official augmentation: no limit on how much of a crop one class may cover, no color jitter but
# brightness. Small images are padded at random with the mean color, in the channel order that the
# model's data_preprocessor has.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='Resize', scale=(100000, 520), keep_ratio=True, interpolation='bicubic'),
    dict(type='mmhrformer.RandomScaleAspect', scale_range=(0.5, 2.0), aspect_range=(0.9, 1.1)),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='mmhrformer.RandomBrightness', shift=10),
    dict(type='mmhrformer.PlaceRandomly', size=crop_size, pad_val=(123.675, 116.28, 103.53)),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(100000, 520), keep_ratio=True, interpolation='bicubic'),
    # The annotation keeps its size: predictions are compared at the original one.
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    # First to the size of the single-scale test, then by each scale, as the official code does.
    dict(type='Resize', scale=(100000, 520), keep_ratio=True, interpolation='bicubic'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale_factor=r, keep_ratio=True) for r in (0.75, 1.0, 1.25)],
            [
                dict(type='RandomFlip', prob=0.0, direction='horizontal'),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

# COCO keypoints (cocodataset.org) at 256x192 (height x width), laid out as
#   data/coco/annotations/person_keypoints_{train,val}2017.json
#   data/coco/person_detection_results/COCO_val2017_detections_AP_H_56_person.json
#   data/coco/{train,val}2017/*.jpg
# docs/datasets.md#coco-keypoints explains how to get it.
# mmpose's own inferencers look for these two names at the top of a config.
dataset_type = 'CocoDataset'
data_mode = 'topdown'
data_root = 'data/coco/'
codec = dict(type='MSRAHeatmap', input_size=(192, 256), heatmap_size=(48, 64), sigma=2)

train_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    # The official dataset shifts boxes by up to a fifth of their sides. RandomHalfBody replaces them.
    dict(type='mmhrformer.RandomBoxShift', shift=0.16, prob=0.3),
    dict(type='RandomFlip', direction='horizontal'),
    dict(type='RandomHalfBody'),
    # mmpose's RandomBBoxTransform would truncate the normal distributions instead of clipping.
    dict(type='mmhrformer.RandomScaleRotation', scale_std=0.5, rotation_std=40, rotation_prob=0.6),
    dict(type='TopdownAffine', input_size=codec['input_size']),
    dict(type='GenerateTarget', encoder=codec),
    dict(type='PackPoseInputs'),
]
val_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=codec['input_size']),
    dict(type='PackPoseInputs'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_mode=data_mode,
        ann_file='annotations/person_keypoints_train2017.json',
        data_prefix=dict(img='train2017/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_mode=data_mode,
        ann_file='annotations/person_keypoints_val2017.json',
        # Boxes of a person detector with 56.4 AP.
        bbox_file=data_root
        + 'person_detection_results/COCO_val2017_detections_AP_H_56_person.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        pipeline=val_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric', ann_file=data_root + 'annotations/person_keypoints_val2017.json'
)
test_evaluator = val_evaluator

# Beyond the paper: no results are reported for this model.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/runtime/det.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmhrformer.HRFormer',
        arch='small',
        drop_path_rate=0.1,
        out_indices=(1, 2, 3),  # anchors begin at 1/8 of the image
        norm_cfg=dict(type='SyncBN'),
        init_cfg=dict(type='Pretrained', checkpoint='mmhrformer://hrformer-small_8xb128_in1k'),
    ),
    neck=dict(in_channels=[64, 128, 256], start_level=0),
)

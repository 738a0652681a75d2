_base_ = [
    '../_base_/models/hrformer_pose.py',
    '../_base_/datasets/coco_256x192.py',
    '../_base_/schedules/coco_210e.py',
    '../_base_/runtime/pose.py',
]

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.2),
    head=dict(in_channels=78, decoder=_base_.codec),
)

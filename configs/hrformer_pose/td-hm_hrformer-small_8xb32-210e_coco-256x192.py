_base_ = [
    '../_base_/models/hrformer_pose.py',
    '../_base_/datasets/coco_256x192.py',
    '../_base_/schedules/coco_210e.py',
    '../_base_/runtime/pose.py',
]

model = dict(head=dict(decoder=_base_.codec))

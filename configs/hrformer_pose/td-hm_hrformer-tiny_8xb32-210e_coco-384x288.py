_base_ = [
    '../_base_/models/hrformer_pose.py',
    '../_base_/datasets/coco_384x288.py',
    '../_base_/schedules/coco_210e.py',
    '../_base_/runtime/pose.py',
]

# The official repository has no pose config for the tiny architecture; this one takes the
# recipe of the small one.
model = dict(
    backbone=dict(
        arch='tiny',
        init_cfg=dict(checkpoint='mmhrformer://hrformer-tiny_8xb128_in1k'),
    ),
    head=dict(in_channels=18, decoder=_base_.codec),
)

_base_ = [
    '../_base_/models/hrformer_pose.py',
    '../_base_/datasets/coco_256x192.py',
    '../_base_/schedules/coco_210e.py',
    '../_base_/runtime/pose.py',
]

# The paper's text says 128 images per step for HRFormer-B; the official config has 8 GPUs x 32.
model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='mmhrformer://hrformer-base_8xb128_in1k'),
    ),
    head=dict(in_channels=78, decoder=_base_.codec),
)

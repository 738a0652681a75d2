_base_ = [
    '../_base_/models/hrformer_pose.py',
    '../_base_/datasets/coco_384x288.py',
    '../_base_/schedules/coco_210e.py',
    '../_base_/runtime/pose.py',
]

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint='mmhrformer://hrformer-base_8xb128_in1k'),
    ),
    head=dict(in_channels=78, decoder=_base_.codec),
)

# The official config has 8 images on each of 8 GPUs at this size; the paper's text says 128 in
# total for HRFormer-B. (mmpose trained its own with 32 on each and a drop path rate of 0.2.)
train_dataloader = dict(batch_size=8)
auto_scale_lr = dict(base_batch_size=64)

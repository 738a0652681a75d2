# The layout of HRFormer-T for the HRNet of mmpretrain, mmpose and mmsegmentation. In pose and
# segmentation, training starts from the checkpoint of the ImageNet config of the same name.
# The configs take `backbone` out by `_base_.pop`.
extra = dict(
    stage1=dict(
        num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(2,), num_channels=(64,)
    ),
    stage2=dict(
        num_modules=1,
        num_branches=2,
        block='BASIC',
        num_blocks=(2, 2),
        num_channels=(18, 36),
    ),
    stage3=dict(
        num_modules=3,
        num_branches=3,
        block='BASIC',
        num_blocks=(2, 2, 2),
        num_channels=(18, 36, 72),
    ),
    stage4=dict(
        num_modules=2,
        num_branches=4,
        block='BASIC',
        num_blocks=(2, 2, 2, 2),
        num_channels=(18, 36, 72, 144),
    ),
)
backbone = dict(
    type='HRNet',
    extra=extra,
    norm_cfg=dict(type='SyncBN'),
    init_cfg=dict(
        type='Pretrained',
        checkpoint='work_dirs/hrnet-tiny_8xb128_in1k/epoch_300.pth',
        prefix='backbone.',
    ),
)

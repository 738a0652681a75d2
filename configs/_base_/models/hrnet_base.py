# The layout of HRFormer-B for the HRNet of mmpretrain, mmpose and mmsegmentation.
extra = dict(
    stage1=dict(
        num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(2,), num_channels=(64,)
    ),
    stage2=dict(
        num_modules=1,
        num_branches=2,
        block='BASIC',
        num_blocks=(2, 2),
        num_channels=(78, 156),
    ),
    stage3=dict(
        num_modules=4,
        num_branches=3,
        block='BASIC',
        num_blocks=(2, 2, 2),
        num_channels=(78, 156, 312),
    ),
    stage4=dict(
        num_modules=2,
        num_branches=4,
        block='BASIC',
        num_blocks=(2, 2, 2, 2),
        num_channels=(78, 156, 312, 624),
    ),
)

# The layout of HRFormer-B for the HRNet of mmpretrain, mmpose and mmsegmentation.
_base_ = ['hrnet_tiny.py']

extra = dict(
    stage2=dict(num_channels=(78, 156)),
    stage3=dict(num_modules=4, num_channels=(78, 156, 312)),
    stage4=dict(num_channels=(78, 156, 312, 624)),
)
backbone = dict(
    extra=extra, init_cfg=dict(checkpoint='work_dirs/hrnet-base_8xb128_in1k/epoch_300.pth')
)

# The layout of HRFormer-S for the HRNet of mmpretrain, mmpose and mmsegmentation.
_base_ = ['hrnet_tiny.py']

extra = dict(
    stage2=dict(num_channels=(32, 64)),
    stage3=dict(num_modules=4, num_channels=(32, 64, 128)),
    stage4=dict(num_channels=(32, 64, 128, 256)),
)
backbone = dict(
    extra=extra, init_cfg=dict(checkpoint='work_dirs/hrnet-small_8xb128_in1k/epoch_300.pth')
)

# Table 8: IntraWin-T, which is Swin-T without the shift of the windows.
_base_ = ['swin-tiny_8xb128_in1k.py']

model = dict(backbone=dict(stage_cfgs=dict(block_cfgs=dict(shift=False))))

# Table 11: HRNet-S, the layout of HRFormer-S with basic blocks, trained as HRFormer-S is.
_base_ = ['../hrformer_cls/hrformer-small_8xb128_in1k.py', '../_base_/ablations/hrnet_small.py']

model = dict(
    backbone=dict(_delete_=True, type='HRNet', extra=_base_.pop('backbone').extra),
    neck=[
        dict(type='HRFuseScales', in_channels=(32, 64, 128, 256)),
        dict(type='GlobalAveragePooling'),
    ],
)

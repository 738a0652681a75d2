# Table 11: HRNet-T, the layout of HRFormer-T with basic blocks, trained as HRFormer-T is.
_base_ = ['../hrformer_cls/hrformer-tiny_8xb128_in1k.py', '../_base_/ablations/hrnet_tiny.py']

model = dict(
    backbone=dict(_delete_=True, type='HRNet', extra=_base_.pop('backbone').extra),
    neck=[
        dict(type='HRFuseScales', in_channels=(18, 36, 72, 144)),
        dict(type='GlobalAveragePooling'),
    ],
)

# Table 11: HRNet-B, the layout of HRFormer-B with basic blocks, trained as HRFormer-B is.
_base_ = ['../hrformer_cls/hrformer-base_8xb128_in1k.py', '../_base_/ablations/hrnet_base.py']

model = dict(
    backbone=dict(_delete_=True, type='HRNet', extra=_base_.pop('backbone').extra),
    neck=[
        dict(type='HRFuseScales', in_channels=(78, 156, 312, 624)),
        dict(type='GlobalAveragePooling'),
    ],
)

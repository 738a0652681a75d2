# Table 11: HRNet-T, the layout of HRFormer-T with basic blocks, trained as HRFormer-T is.
_base_ = [
    'ocrnet_hrformer-tiny_8xb2-60k_pascal-context-59-520x520.py',
    '../_base_/ablations/hrnet_tiny.py',
]

model = dict(backbone=dict(_delete_=True, **_base_.pop('backbone')))

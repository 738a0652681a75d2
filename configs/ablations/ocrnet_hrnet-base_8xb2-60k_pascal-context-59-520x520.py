# Table 11: HRNet-B, the layout of HRFormer-B with basic blocks, trained as HRFormer-B is.
_base_ = [
    '../hrformer_seg/ocrnet_hrformer-base_8xb2-60k_pascal-context-59-520x520.py',
    '../_base_/ablations/hrnet_base.py',
]

model = dict(backbone=dict(_delete_=True, **_base_.pop('backbone')))

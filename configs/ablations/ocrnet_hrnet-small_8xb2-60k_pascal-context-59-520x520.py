# Table 11: HRNet-S, the layout of HRFormer-S with basic blocks, trained as HRFormer-S is.
_base_ = [
    '../hrformer_seg/ocrnet_hrformer-small_8xb2-60k_pascal-context-59-520x520.py',
    '../_base_/ablations/hrnet_small.py',
]

model = dict(backbone=dict(_delete_=True, **_base_.pop('backbone')))

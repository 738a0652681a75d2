# Table 11: HRNet-B, the layout of HRFormer-B with basic blocks, trained as HRFormer-B is.
_base_ = [
    '../hrformer_pose/td-hm_hrformer-base_8xb32-210e_coco-256x192.py',
    '../_base_/ablations/hrnet_base.py',
]

model = dict(backbone=dict(_delete_=True, **_base_.pop('backbone')))

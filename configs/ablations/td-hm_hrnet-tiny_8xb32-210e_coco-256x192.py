# Table 11: HRNet-T, the layout of HRFormer-T with basic blocks, trained as HRFormer-T is.
_base_ = [
    '../hrformer_pose/td-hm_hrformer-tiny_8xb32-210e_coco-256x192.py',
    '../_base_/ablations/hrnet_tiny.py',
]

model = dict(backbone=dict(_delete_=True, **_base_.pop('backbone')))

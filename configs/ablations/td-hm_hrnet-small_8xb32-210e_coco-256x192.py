# Table 11: HRNet-S, the layout of HRFormer-S with basic blocks, trained as HRFormer-S is.
_base_ = [
    '../hrformer_pose/td-hm_hrformer-small_8xb32-210e_coco-256x192.py',
    '../_base_/ablations/hrnet_small.py',
]

model = dict(backbone=dict(_delete_=True, **_base_.pop('backbone')))

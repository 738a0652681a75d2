# Table 7: the FFN without the 3x3 depth-wise convolution.
_base_ = [
    '../hrformer_pose/td-hm_hrformer-tiny_8xb32-210e_coco-256x192.py',
    '../_base_/ablations/tiny_no_dwconv.py',
]

model = dict(backbone=_base_.pop('backbone'))

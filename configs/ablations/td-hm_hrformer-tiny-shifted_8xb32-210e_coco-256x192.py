# Table 9: every second block has shifted windows, and no block the depth-wise convolution.
_base_ = [
    '../hrformer_pose/td-hm_hrformer-tiny_8xb32-210e_coco-256x192.py',
    '../_base_/ablations/tiny_shifted.py',
]

model = dict(backbone=_base_.pop('backbone'))

# Table 7: the FFN without the 3x3 depth-wise convolution.
_base_ = [
    'ocrnet_hrformer-tiny_8xb2-60k_pascal-context-59-520x520.py',
    '../_base_/ablations/tiny_no_dwconv.py',
]

model = dict(backbone=_base_.pop('backbone'))

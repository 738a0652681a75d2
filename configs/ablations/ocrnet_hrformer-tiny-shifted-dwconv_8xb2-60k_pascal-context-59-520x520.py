# Table 9: every second block has shifted windows, and all have the depth-wise convolution.
_base_ = [
    'ocrnet_hrformer-tiny_8xb2-60k_pascal-context-59-520x520.py',
    '../_base_/ablations/tiny_shifted_dwconv.py',
]

model = dict(backbone=_base_.pop('backbone'))

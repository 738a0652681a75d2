# Table 9: every second block has shifted windows, and all have the depth-wise convolution.
_base_ = [
    '../hrformer_cls/hrformer-tiny_8xb128_in1k.py',
    '../_base_/ablations/tiny_shifted_dwconv.py',
]

model = dict(backbone=dict(attn_cfg=_base_.pop('backbone').attn_cfg))

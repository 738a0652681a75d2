# Table 7: the FFN without the 3x3 depth-wise convolution.
_base_ = [
    '../hrformer_cls/hrformer-tiny_8xb128_in1k.py',
    '../_base_/ablations/tiny_no_dwconv.py',
]

model = dict(backbone=dict(ffn_cfg=_base_.pop('backbone').ffn_cfg))

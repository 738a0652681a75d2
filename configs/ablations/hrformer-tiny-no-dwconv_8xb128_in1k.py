# Table 7: the FFN without the 3x3 depth-wise convolution.
_base_ = ['../hrformer_cls/hrformer-tiny_8xb128_in1k.py']

model = dict(backbone=dict(ffn_cfg=dict(type='mmhrformer.FFN')))

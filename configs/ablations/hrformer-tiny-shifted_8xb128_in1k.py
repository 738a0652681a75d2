# Table 9: every second block has shifted windows, and no block the depth-wise convolution.
_base_ = ['hrformer-tiny-shifted-dwconv_8xb128_in1k.py']

model = dict(backbone=dict(ffn_cfg=dict(type='mmhrformer.FFN')))

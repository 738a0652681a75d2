# Table 8: Swin-T with the FFN of HRFormer, which has a 3x3 depth-wise convolution.
_base_ = ['swin-tiny_8xb128_in1k.py']

model = dict(backbone=dict(type='mmhrformer.SwinTransformer'))

# The same without the 3x3 depth-wise convolution.
_base_ = ['tiny_shifted_dwconv.py']

backbone = dict(
    ffn_cfg=dict(type='mmhrformer.FFN'),
    init_cfg=dict(
        checkpoint='mmhrformer://work_dirs/hrformer-tiny-shifted_8xb128_in1k/epoch_300.pth'
    ),
)

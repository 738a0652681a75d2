# Table 7: the FFN without the 3x3 depth-wise convolution. Training starts from the weights that the
# ImageNet config of the same name wrote.
_base_ = ['ocrnet_hrformer-tiny_8xb2-60k_pascal-context-59-520x520.py']

model = dict(
    backbone=dict(
        ffn_cfg=dict(type='mmhrformer.FFN'),
        init_cfg=dict(
            checkpoint='mmhrformer://work_dirs/hrformer-tiny-no-dwconv_8xb128_in1k/epoch_300.pth'
        ),
    )
)

# Table 9: every second block has shifted windows, and no block the depth-wise convolution. Training
# starts from the weights that the ImageNet config of the same name wrote.
_base_ = ['ocrnet_hrformer-tiny-shifted-dwconv_8xb2-60k_pascal-context-59-520x520.py']

model = dict(
    backbone=dict(
        ffn_cfg=dict(type='mmhrformer.FFN'),
        init_cfg=dict(
            checkpoint='mmhrformer://work_dirs/hrformer-tiny-shifted_8xb128_in1k/epoch_300.pth'
        ),
    )
)

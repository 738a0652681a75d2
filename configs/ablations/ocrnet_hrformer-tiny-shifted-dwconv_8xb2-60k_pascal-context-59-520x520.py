# Table 9: every second block has shifted windows, and all have the depth-wise convolution. Training
# starts from the weights that the ImageNet config of the same name wrote.
_base_ = ['ocrnet_hrformer-tiny_8xb2-60k_pascal-context-59-520x520.py']

model = dict(
    backbone=dict(
        attn_cfg=[
            dict(type='mmhrformer.LocalWindowSelfAttention'),
            dict(type='mmhrformer.ShiftedWindowSelfAttention'),
        ],
        init_cfg=dict(
            checkpoint='mmhrformer://work_dirs/hrformer-tiny-shifted-dwconv_8xb128_in1k/epoch_300.pth'
        ),
    )
)

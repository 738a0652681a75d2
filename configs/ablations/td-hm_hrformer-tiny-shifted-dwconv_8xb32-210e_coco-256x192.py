# Table 9: every second block has shifted windows, and all have the depth-wise convolution. Training
# starts from the weights that the ImageNet config of the same name wrote.
_base_ = ['../hrformer_pose/td-hm_hrformer-tiny_8xb32-210e_coco-256x192.py']

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

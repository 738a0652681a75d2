# Table 7: the FFN without the 3x3 depth-wise convolution. Training starts from the weights that the
# ImageNet config of the same name wrote.
_base_ = ['../hrformer_pose/td-hm_hrformer-tiny_8xb32-210e_coco-256x192.py']

model = dict(
    backbone=dict(
        ffn_cfg=dict(type='mmhrformer.FFN'),
        init_cfg=dict(
            checkpoint='mmhrformer://work_dirs/hrformer-tiny-no-dwconv_8xb128_in1k/epoch_300.pth'
        ),
    )
)

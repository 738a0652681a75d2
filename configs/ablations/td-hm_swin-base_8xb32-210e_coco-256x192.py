# Table 10: Swin-B with the deconvolutions of SimpleBaseline, 3 of them to come from 1/32 of the
# image to heatmaps at 1/4. Pre-trained on ImageNet-21K, then ImageNet-1K at 384x384.
_base_ = ['../hrformer_pose/td-hm_hrformer-base_8xb32-210e_coco-256x192.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SwinTransformer',
        arch='base',
        img_size=(256, 192),
        window_size=12,
        pad_small_map=True,
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/'
            'swin-transformer/convert/swin_base_patch4_window12_384_22kto1k-d59b0d1d.pth',
            prefix='backbone.',
        ),
    ),
    head=dict(
        in_channels=1024,
        deconv_out_channels=(256, 256, 256),
        deconv_kernel_sizes=(4, 4, 4),
    ),
)

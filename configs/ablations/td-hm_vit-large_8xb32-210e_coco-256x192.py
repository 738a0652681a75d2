# Table 10: ViT-Large with the deconvolutions of SimpleBaseline, 2 of them to come from 1/16 of the
# image to heatmaps at 1/4. Pre-trained on ImageNet-21K, then ImageNet-1K at 384x384.
_base_ = ['../hrformer_pose/td-hm_hrformer-base_8xb32-210e_coco-256x192.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch='large',
        img_size=(256, 192),
        patch_size=16,
        out_type='featmap',
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/'
            'vit/finetune/vit-large-p16_in21k-pre-3rdparty_ft-64xb64_in1k-384_20210928-b20ba619.pth',
            prefix='backbone.',
        ),
    ),
    head=dict(
        in_channels=1024,
        deconv_out_channels=(256, 256),
        deconv_kernel_sizes=(4, 4),
    ),
)

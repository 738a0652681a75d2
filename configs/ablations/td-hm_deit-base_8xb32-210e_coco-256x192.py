# Table 10: DeiT-B instead of ViT-Large. Pre-trained on ImageNet-1K, distilled, at 384x384.
_base_ = ['td-hm_vit-large_8xb32-210e_coco-256x192.py']

model = dict(
    backbone=dict(
        type='mmpretrain.DistilledVisionTransformer',
        arch='deit-base',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/'
            'deit/deit-base-distilled_3rdparty_ft-16xb32_in1k-384px_20211216-e48d6000.pth'
        ),
    ),
    head=dict(in_channels=768),
)

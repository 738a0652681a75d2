# Table 11: HRNet-T, the layout of HRFormer-T with basic blocks, trained as HRFormer-T is, from the
# weights that its ImageNet config wrote.
_base_ = [
    'ocrnet_hrformer-tiny_8xb2-60k_pascal-context-59-520x520.py',
    '../_base_/models/hrnet_tiny.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='HRNet',
        extra=_base_.extra,
        norm_cfg=dict(type='SyncBN'),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/hrnet-tiny_8xb128_in1k/epoch_300.pth',
            prefix='backbone.',
        ),
    )
)

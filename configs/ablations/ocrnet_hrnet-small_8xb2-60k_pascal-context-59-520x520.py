# Table 11: HRNet-S, the layout of HRFormer-S with basic blocks, trained as HRFormer-S is, from the
# weights that its ImageNet config wrote.
_base_ = [
    '../hrformer_seg/ocrnet_hrformer-small_8xb2-60k_pascal-context-59-520x520.py',
    '../_base_/models/hrnet_small.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='HRNet',
        extra=_base_.extra,
        norm_cfg=dict(type='SyncBN'),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/hrnet-small_8xb128_in1k/epoch_300.pth',
            prefix='backbone.',
        ),
    )
)

# Pose and segmentation with shifted windows: training starts from the checkpoint of the ImageNet
# config of the same name. The configs take `backbone` out by `_base_.pop`.
backbone = dict(
    attn_cfg=[
        dict(type='mmhrformer.LocalWindowSelfAttention'),
        dict(type='mmhrformer.ShiftedWindowSelfAttention'),
    ],
    init_cfg=dict(
        checkpoint='mmhrformer://work_dirs/hrformer-tiny-shifted-dwconv_8xb128_in1k/epoch_300.pth'
    ),
)

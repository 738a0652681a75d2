# Pose and segmentation without the 3x3 depth-wise convolution: training starts from the checkpoint
# of the ImageNet config of the same name. The configs take `backbone` out by `_base_.pop`.
backbone = dict(
    ffn_cfg=dict(type='mmhrformer.FFN'),
    init_cfg=dict(
        checkpoint='mmhrformer://work_dirs/hrformer-tiny-no-dwconv_8xb128_in1k/epoch_300.pth'
    ),
)

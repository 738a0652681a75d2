# HRFormer with a heatmap head on its finest stream; `arch`, the channels, the drop path rate and
# the decoder are set by the configs. Training starts from the ImageNet checkpoint of
# that arch, whatever its window; --cfg-options model.backbone.init_cfg=None trains from scratch.
#
# `with_rpe`: the paper's attention has a relative position bias, and mmpose's checkpoints were
# trained with it. The official pose code, as published, computes the bias and does not add it;
# which way the official checkpoints were trained is not known. Evaluate those with both settings.
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=dict(
        type='PoseDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        type='mmhrformer.HRFormer',
        arch='small',
        drop_path_rate=0.1,
        with_rpe=True,
        upsample='bilinear',
        out_indices=(0,),
        norm_cfg=dict(type='SyncBN'),
        init_cfg=dict(type='Pretrained', checkpoint='mmhrformer://hrformer-small_8xb128_in1k'),
    ),
    head=dict(
        type='HeatmapHead',
        in_channels=32,
        out_channels=17,
        deconv_out_channels=None,
        loss=dict(type='KeypointMSELoss', use_target_weight=True),
    ),
    test_cfg=dict(flip_test=True, flip_mode='heatmap', shift_heatmap=True),
)

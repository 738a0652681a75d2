# HRFormer with the OCR head and its auxiliary head; `arch`, the channels, classes, losses and the
# drop path rate are set by the configs. Training starts from the ImageNet checkpoint of
# that arch, whatever its window; --cfg-options model.backbone.init_cfg=None trains from scratch.
norm_cfg = dict(type='SyncBN')
model = dict(
    type='CascadeEncoderDecoder',
    num_stages=2,
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        # The official code feeds BGR images with the statistics in RGB order, although its
        # ImageNet pre-training saw RGB. The released checkpoints need it this way.
        bgr_to_rgb=False,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type='mmhrformer.HRFormer',
        arch='small',
        drop_path_rate=0.2,
        norm_cfg=norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint='mmhrformer://hrformer-small_8xb128_in1k'),
    ),
    decode_head=[
        dict(
            type='mmhrformer.OCRAuxHead',
            in_channels=(32, 64, 128, 256),
            in_index=(0, 1, 2, 3),
            input_transform='resize_concat',
            channels=512,
            num_classes=19,
            norm_cfg=norm_cfg,
            loss_decode=dict(type='mmhrformer.WeightedCrossEntropyLoss', loss_weight=0.4),
        ),
        dict(
            type='mmhrformer.OCRHead',
            in_channels=(32, 64, 128, 256),
            in_index=(0, 1, 2, 3),
            input_transform='resize_concat',
            channels=512,
            ocr_channels=256,
            num_classes=19,
            norm_cfg=norm_cfg,
            loss_decode=dict(type='mmhrformer.OHEMCrossEntropyLoss', thresh=0.9, min_kept=100000),
        ),
    ],
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

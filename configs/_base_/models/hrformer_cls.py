# HRFormer with the classification neck; `arch`, the channels and the drop path rate are set by
# the configs.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmhrformer.HRFormer', arch='small', drop_path_rate=0.0),
    neck=[
        dict(type='mmhrformer.HRFormerFusion', in_channels=(32, 64, 128, 256)),
        dict(type='GlobalAveragePooling'),
    ],
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2048,
        # The official code keeps torch's default initialization.
        init_cfg=None,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        cal_acc=False,
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)

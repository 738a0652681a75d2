_base_ = [
    '../_base_/models/hrformer_cls.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/runtime/cls.py',
]

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.2),
    neck=[
        dict(type='mmhrformer.HRFormerFusion', in_channels=(78, 156, 312, 624)),
        dict(type='GlobalAveragePooling'),
    ],
)

# Beyond the paper: no results are reported for this model.
_base_ = ['mask-rcnn_hrformer-small_hrfpn_8xb2-12e_coco.py']
model = dict(
    backbone=dict(
        arch='tiny',
        init_cfg=dict(checkpoint='mmhrformer://hrformer-tiny_8xb128_in1k'),
    ),
    neck=dict(in_channels=[18, 36, 72, 144]),
)

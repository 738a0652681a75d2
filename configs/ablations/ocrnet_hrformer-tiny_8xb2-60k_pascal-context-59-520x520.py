# HRFormer-T on PASCAL-Context, the baseline of Tables 7, 9 and 11, with the recipe of HRFormer-S.
_base_ = ['../hrformer_seg/ocrnet_hrformer-small_8xb2-60k_pascal-context-59-520x520.py']

model = dict(
    backbone=dict(
        arch='tiny',
        init_cfg=dict(checkpoint='mmhrformer://hrformer-tiny_8xb128_in1k'),
    ),
    decode_head=[dict(head, in_channels=(18, 36, 72, 144)) for head in _base_.model.decode_head],
)

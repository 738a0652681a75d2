_base_ = ['ocrnet_hrformer-small_8xb2-60k_pascal-context-59-520x520.py']

model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(checkpoint='mmhrformer://hrformer-base_8xb128_in1k'),
    ),
    decode_head=[dict(head, in_channels=(78, 156, 312, 624)) for head in _base_.model.decode_head],
)

_base_ = ['ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024.py']

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='mmhrformer://hrformer-base_8xb128_in1k'),
    ),
    decode_head=[dict(head, in_channels=(78, 156, 312, 624)) for head in _base_.model.decode_head],
)

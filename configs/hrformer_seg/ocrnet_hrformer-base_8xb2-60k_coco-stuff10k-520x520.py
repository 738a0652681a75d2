_base_ = ['ocrnet_hrformer-small_8xb2-60k_coco-stuff10k-520x520.py']

aux_head, ocr_head = _base_.model.decode_head
aux_head.in_channels = ocr_head.in_channels = (78, 156, 312, 624)
model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(checkpoint='mmhrformer://hrformer-base_8xb128_in1k'),
    ),
    decode_head=[aux_head, ocr_head],
)
del aux_head, ocr_head

# The "v3" of the official scripts: grouped 7x7 instead of 3x3 convolutions before the OCR head.
_base_ = [
    '../hrformer_seg/ocrnet_hrformer-base-w13_8xb2-150k_ade20k-520x520.py',
    '../_base_/ablations/ocr_v3.py',
]

model = dict(
    decode_head=[
        dict(head, **ocr) for ocr in [_base_.pop('ocr')] for head in _base_.model.decode_head
    ]
)

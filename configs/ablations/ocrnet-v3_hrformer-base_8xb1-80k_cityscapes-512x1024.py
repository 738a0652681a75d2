# The "v3" of the official scripts: grouped 7x7 instead of 3x3 convolutions before the OCR head.
# The official script is named w15 but trains windows of 7.
_base_ = [
    '../hrformer_seg/ocrnet_hrformer-base_8xb1-80k_cityscapes-512x1024.py',
    '../_base_/ablations/ocr_v3.py',
]

model = dict(
    decode_head=[
        dict(head, **ocr) for ocr in [_base_.pop('ocr')] for head in _base_.model.decode_head
    ]
)

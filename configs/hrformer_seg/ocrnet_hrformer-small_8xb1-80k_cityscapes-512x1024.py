_base_ = [
    '../_base_/models/hrformer_ocr.py',
    '../_base_/datasets/cityscapes_512x1024.py',
    '../_base_/schedules/seg_80k.py',
    '../_base_/runtime/seg.py',
]

aux_head, ocr_head = _base_.model.decode_head
aux_head.loss_decode.class_weight = _base_.class_weight
ocr_head.loss_decode.class_weight = _base_.class_weight
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    decode_head=[aux_head, ocr_head],
)
del aux_head, ocr_head

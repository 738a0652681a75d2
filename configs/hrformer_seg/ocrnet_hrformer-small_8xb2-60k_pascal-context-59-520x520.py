_base_ = [
    '../_base_/models/hrformer_ocr.py',
    '../_base_/datasets/pascal_context_59_520x520.py',
    '../_base_/schedules/seg_60k.py',
    '../_base_/runtime/seg.py',
]

aux_head, ocr_head = _base_.model.decode_head
aux_head.num_classes = ocr_head.num_classes = 59
# The official README says OHEM, but the scripts that produced its numbers train without it.
ocr_head.loss_decode = dict(type='mmhrformer.WeightedCrossEntropyLoss')
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    decode_head=[aux_head, ocr_head],
)
del aux_head, ocr_head

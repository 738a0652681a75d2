_base_ = [
    '../_base_/models/hrformer_ocr.py',
    '../_base_/datasets/coco_stuff10k_520x520.py',
    '../_base_/schedules/seg_60k.py',
    '../_base_/runtime/seg.py',
]

model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    decode_head=[dict(head, num_classes=171) for head in _base_.model.decode_head],
)

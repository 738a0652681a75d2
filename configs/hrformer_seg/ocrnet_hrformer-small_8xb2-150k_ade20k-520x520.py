_base_ = [
    '../_base_/models/hrformer_ocr.py',
    '../_base_/datasets/ade20k_520x520.py',
    '../_base_/schedules/seg_150k.py',
    '../_base_/runtime/seg.py',
]

# 16 images per step: the official README says 8, but the scripts use the 16 of their data config.
model = dict(
    # Images are tested with sides that are multiples of 8, padded with the mean color.
    data_preprocessor=dict(size=_base_.crop_size, test_cfg=dict(size_divisor=8)),
    decode_head=[dict(head, num_classes=150) for head in _base_.model.decode_head],
)

# Appendix: windows that are larger on finer streams.
_base_ = ['../hrformer_seg/ocrnet_hrformer-base-w15_8xb2-60k_coco-stuff10k-520x520.py']

model = dict(backbone=dict(window_size=(15, 13, 11, 9)))

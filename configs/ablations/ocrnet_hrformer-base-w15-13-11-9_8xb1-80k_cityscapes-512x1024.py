# Appendix: windows that are larger on finer streams.
_base_ = ['../hrformer_seg/ocrnet_hrformer-base-w15_8xb1-80k_cityscapes-512x1024.py']

model = dict(backbone=dict(window_size=(15, 13, 11, 9)))

_base_ = ['ocrnet_hrformer-base_8xb1-80k_cityscapes-512x1024.py']

model = dict(backbone=dict(window_size=15))

_base_ = ['ocrnet_hrformer-base_8xb2-150k_ade20k-520x520.py']

model = dict(backbone=dict(window_size=13))

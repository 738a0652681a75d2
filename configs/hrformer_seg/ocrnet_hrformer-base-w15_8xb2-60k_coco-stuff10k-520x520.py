_base_ = ['ocrnet_hrformer-base_8xb2-60k_coco-stuff10k-520x520.py']

model = dict(backbone=dict(window_size=15))

_base_ = ['ocrnet_hrformer-base_8xb2-150k_ade20k-520x520.py']

# The official README lists this model without a script or a result: the recipe of window 13.
model = dict(backbone=dict(window_size=15))

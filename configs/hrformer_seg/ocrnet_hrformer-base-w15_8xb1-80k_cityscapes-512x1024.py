_base_ = ['ocrnet_hrformer-base_8xb1-80k_cityscapes-512x1024.py']

model = dict(backbone=dict(window_size=15))

# Seven scales instead of three, as the official script tests this model.
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale_factor=r, keep_ratio=True)
    for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
]

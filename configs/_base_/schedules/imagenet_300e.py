# Official classification recipe: 300 epochs, 8 GPUs x 128 images.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='mmhrformer.DecayGroupsConstructor',
    # 5e-4 * batch / 512
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    # No weight decay for biases and norms; unlike in pose and segmentation, the relative position
    # bias tables are decayed.
    paramwise_cfg=dict(no_decay=['vectors']),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = dict(
    type='mmhrformer.WarmupCosineLR',
    warmup=20,
    start_factor=1e-3,
    end=300,
    end_factor=1e-2,
    by_epoch=True,
    convert_to_iter_based=True,
)
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=1024)

# Official pose recipe: 210 epochs, 8 GPUs x 32 images.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='mmhrformer.DecayGroupsConstructor',
    optimizer=dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
    # Weight decay for all but the relative position bias tables.
    paramwise_cfg=dict(no_decay=['bias_tables']),
)
param_scheduler = [
    # mmengine counts both ends of a schedule: this is a warm-up of 500 iterations.
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=501),
    dict(type='MultiStepLR', milestones=[170, 200], gamma=0.1, by_epoch=True, begin=0, end=210),
]
train_cfg = dict(by_epoch=True, max_epochs=210, val_interval=10)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=256)

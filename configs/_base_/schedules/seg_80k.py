# Official segmentation recipe: 80,000 iterations, 1,500 of them warm-up; the polynomial decay
# starts when the warm-up ends.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='mmhrformer.DecayGroupsConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
    # Weight decay only for the weights of convolutions and linear layers. The official scripts also
    # set a ten times higher learning rate for the heads, but the code ignores that option.
    paramwise_cfg=dict(no_decay=['vectors', 'bias_tables']),
)
param_scheduler = [
    # mmengine counts both ends of a schedule, so `end` is one more than the iteration meant.
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=1500, end=80001),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=80000, val_interval=10000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
# 8 GPUs x 1 image
auto_scale_lr = dict(base_batch_size=8)

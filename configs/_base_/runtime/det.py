# Runtime settings of detection (mmdet), besides model and data: optimizer and schedule of mmdet's
# Swin Transformers, 12 epochs of 8 GPUs x 2 images.
default_scope = 'mmdet'
custom_imports = dict(imports=['mmhrformer'], allow_failed_imports=False)

optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='mmhrformer.DecayGroupsConstructor',
    # Weight decay for all but biases, norms and the relative position bias tables.
    paramwise_cfg=dict(no_decay=['vectors', 'bias_tables']),
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    # mmengine counts both ends of a schedule: this is a warm-up of 1000 iterations.
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1001),
    dict(type='MultiStepLR', milestones=[8, 11], gamma=0.1, by_epoch=True, begin=0, end=12),
]
train_cfg = dict(by_epoch=True, max_epochs=12, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=16)

# Safe against interruption: checkpoints stay intact, and --resume continues exactly.
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmhrformer.SafeCheckpointHook', interval=1, save_best='coco/bbox_mAP', rule='greater'
    ),
    sampler_seed=dict(type='mmhrformer.ResumableSeedHook'),
    visualization=dict(type='DetVisualizationHook'),
)
env_cfg = dict(
    cudnn_benchmark=False,  # images of many sizes
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
# ConfigCheckVisBackend stops a run that cannot work before anything is built.
vis_backends = [dict(type='LocalVisBackend'), dict(type='mmhrformer.ConfigCheckVisBackend')]
visualizer = dict(type='DetLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
log_level = 'INFO'
load_from = None
resume = False

# Runtime settings of classification (mmpretrain), besides model, data and schedule.
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmhrformer'], allow_failed_imports=False)

# Safe against interruption: checkpoints stay intact, and --resume continues exactly.
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='mmhrformer.SafeCheckpointHook', interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type='mmhrformer.ResumableSeedHook'),
    visualization=dict(type='VisualizationHook', enable=False),
)
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
# Distributed training: gradients share memory with the communication buffers.
model_wrapper_cfg = dict(
    type='MMDistributedDataParallel', broadcast_buffers=False, gradient_as_bucket_view=True
)
# ConfigCheckVisBackend stops a run that cannot work before anything is built.
vis_backends = [dict(type='LocalVisBackend'), dict(type='mmhrformer.ConfigCheckVisBackend')]
visualizer = dict(type='UniversalVisualizer', vis_backends=vis_backends)
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)

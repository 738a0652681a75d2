# Runtime settings of pose estimation (mmpose), besides model, data and schedule.
default_scope = 'mmpose'
custom_imports = dict(imports=['mmhrformer'], allow_failed_imports=False)

# Safe against interruption: checkpoints stay intact, and --resume continues exactly.
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmhrformer.SafeCheckpointHook',
        interval=10,
        save_best='coco/AP',
        rule='greater',
    ),
    sampler_seed=dict(type='mmhrformer.ResumableSeedHook'),
    visualization=dict(type='PoseVisualizationHook', enable=False),
)
# Averages the statistics of batch normalization over the GPUs before each validation.
# BFloat16PoseHook disables an accuracy that mmpose cannot compute in bf16.
custom_hooks = [dict(type='SyncBuffersHook'), dict(type='mmhrformer.BFloat16PoseHook')]
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
visualizer = dict(type='mmhrformer.PoseVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True, num_digits=6)
log_level = 'INFO'
load_from = None
resume = False

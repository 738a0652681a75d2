# Runtime settings of segmentation (mmsegmentation), besides model, data and schedule.
default_scope = 'mmseg'
custom_imports = dict(imports=['mmhrformer'], allow_failed_imports=False)

# Safe against interruption: checkpoints stay intact, and --resume continues exactly.
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmhrformer.SafeCheckpointHook',
        by_epoch=False,
        interval=10000,
        save_best='mIoU',
    ),
    sampler_seed=dict(type='mmhrformer.ResumableSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
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
visualizer = dict(type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
tta_model = dict(type='mmhrformer.SumLogitsTTAModel')

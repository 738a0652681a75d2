# As seg_80k.py, but 150,000 iterations of twice as many images.
_base_ = ['seg_80k.py']

warmup, poly = _base_.param_scheduler
poly.end = 150001
param_scheduler = [warmup, poly]
train_cfg = dict(max_iters=150000)
# 8 GPUs x 2 images
auto_scale_lr = dict(base_batch_size=16)
del warmup, poly

# As the paper trained it: on 32 GPUs, 1,024 images a step all the same.
_base_ = ['hrformer-base_8xb128_in1k.py']

train_dataloader = dict(batch_size=32)

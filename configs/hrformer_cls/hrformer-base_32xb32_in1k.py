# As in the paper: 32 GPUs, with the same total batch size of 1,024.
_base_ = ['hrformer-base_8xb128_in1k.py']

train_dataloader = dict(batch_size=32)

"""The bare backbone: images in, four feature maps out, gradients back."""

import torch

from mmhrformer import HRFormer

model = HRFormer(arch='tiny', drop_path_rate=0.1)  # or 'small', 'base', or a dict
images = torch.rand(2, 3, 256, 192)  # any size of at least 32x32 pixels

streams = model(images)  # a tuple, from 1/4 to 1/32 of the image
for stream in streams:
    print(tuple(stream.shape))

loss = sum(stream.square().mean() for stream in streams)
loss.backward()
print(f'{sum(p.numel() for p in model.parameters() if p.grad is not None):,} parameters with grad')

# The "v3" of the official scripts: grouped 7x7 instead of 3x3 convolutions in front of the OCR head.
# The official script is named w15 but trains windows of 7.
_base_ = ['../hrformer_seg/ocrnet_hrformer-base_8xb1-80k_cityscapes-512x1024.py']

# As many groups as divide the 1,170 channels of the streams and the 512 of the head.
model = dict(decode_head=[dict(head, kernel_size=7, groups=2) for head in _base_.model.decode_head])

# The "v3" of the official scripts: grouped 7x7 instead of 3x3 convolutions in front of the OCR head.
# The official script is named w15 but trains windows of 7.
_base_ = ['../hrformer_seg/ocrnet_hrformer-base_8xb1-80k_cityscapes-512x1024.py']

# As many groups as divide the 1,170 channels of the streams and the 512 of the head.
aux_head, ocr_head = _base_.model.decode_head
for head in (aux_head, ocr_head):
    head.update(kernel_size=7, groups=2)
model = dict(decode_head=[aux_head, ocr_head])
del head, aux_head, ocr_head

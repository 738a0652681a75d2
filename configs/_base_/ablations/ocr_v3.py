# The "v3" of the official scripts: grouped 7x7 instead of 3x3 convolutions before the OCR
# head, with as many groups as divide the 1,170 channels of the streams of HRFormer-B and the 512 of
# the head. The configs take `ocr` out by `_base_.pop`.
ocr = dict(kernel_size=7, groups=2)

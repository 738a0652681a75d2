# Appendix: windows that are larger on finer streams.
_base_ = [
    '../hrformer_seg/ocrnet_hrformer-base-w15_8xb2-60k_pascal-context-59-520x520.py',
    '../_base_/ablations/windows_15_13_11_9.py',
]

model = dict(backbone=_base_.pop('backbone'))

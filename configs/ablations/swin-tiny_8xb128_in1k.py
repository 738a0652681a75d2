# Table 8: Swin-T, trained as HRFormer-T is.
_base_ = ['../hrformer_cls/hrformer-tiny_8xb128_in1k.py']

model = dict(
    backbone=dict(_delete_=True, type='SwinTransformer', arch='tiny', drop_path_rate=0.2),
    neck=dict(_delete_=True, type='GlobalAveragePooling'),
    head=dict(in_channels=768),
    init_cfg=[
        dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
        dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
    ],
)
# The official code decays the bias tables of HRFormer, but not those of Swin Transformer.
optim_wrapper = dict(paramwise_cfg=dict(no_decay=['vectors', 'bias_tables']))

# PASCAL-Context, 59 classes, the background is ignored (cs.stanford.edu/~roozbeh/pascal-context),
# laid out as
#   data/VOCdevkit/VOC2010/JPEGImages/*.jpg
#   data/VOCdevkit/VOC2010/SegmentationClassContext/*.png
#   data/VOCdevkit/VOC2010/ImageSets/SegmentationContext/{train,val}.txt
# docs/datasets.md#pascal-context explains how to get it.
_base_ = ['seg_520x520.py']

data_root = 'data/VOCdevkit/VOC2010/'
train_dataloader = dict(
    dataset=dict(
        type='PascalContextDataset59',
        data_root=data_root,
        ann_file='ImageSets/SegmentationContext/train.txt',
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClassContext'),
    )
)
val_dataloader = dict(
    dataset=dict(
        type='PascalContextDataset59',
        data_root=data_root,
        ann_file='ImageSets/SegmentationContext/val.txt',
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClassContext'),
    )
)
test_dataloader = val_dataloader

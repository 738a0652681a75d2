# COCO-Stuff 10k, 171 classes (github.com/nightrome/cocostuff10k), laid out as
#   data/coco_stuff10k/images/{train2014,test2014}/*.jpg
#   data/coco_stuff10k/annotations/{train2014,test2014}/*_labelTrainIds.png
# docs/datasets.md#coco-stuff-10k explains how to get it.
_base_ = ['seg_520x520.py']

data_root = 'data/coco_stuff10k/'
train_dataloader = dict(
    dataset=dict(
        type='COCOStuffDataset',
        data_root=data_root,
        reduce_zero_label=True,
        data_prefix=dict(img_path='images/train2014', seg_map_path='annotations/train2014'),
    )
)
val_dataloader = dict(
    dataset=dict(
        type='COCOStuffDataset',
        data_root=data_root,
        reduce_zero_label=True,
        data_prefix=dict(img_path='images/test2014', seg_map_path='annotations/test2014'),
    )
)
test_dataloader = val_dataloader

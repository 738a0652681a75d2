# Writes the file that the COCO server evaluates: its annotations are not public.
_base_ = ['td-hm_hrformer-small_8xb32-210e_coco-384x288.py']

test_dataloader = dict(
    dataset=dict(
        ann_file='annotations/image_info_test-dev2017.json',
        # Boxes of a person detector with 60.9 AP on test-dev.
        bbox_file=_base_.data_root
        + 'person_detection_results/COCO_test-dev2017_detections_AP_H_609_person.json',
        data_prefix=dict(img='test2017/'),
    )
)
test_evaluator = dict(
    ann_file=_base_.data_root + 'annotations/image_info_test-dev2017.json',
    format_only=True,
    outfile_prefix='coco_test-dev2017',
)

"""Pose estimation: people, their boxes, and the detector."""

from __future__ import annotations

from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from inference_samples import CONFIGS, assert_close, check, make_image
from needs import needs

import mmhrformer
from mmhrformer import inference
from mmhrformer.deploy.onnx import number_of_outputs
from mmhrformer.inferencers.pose import check_boxes, check_keypoints


@needs('mmpose')
def test_weights_of_another_code(tmp_path):
    file = tmp_path / 'official.pth'
    torch.save(golden.official_checkpoint('pose', 'keys_pose_tiny.json'), file)
    name = 'td-hm_hrformer-tiny_8xb32-210e_coco-256x192'
    result = inference(name, make_image(80, 60), f'mmhrformer://{file}', device='cpu')
    check('pose', result['predictions'][0])


def test_boxes_of_people(models):
    pose, image = models['pose'], make_image(96, 120)
    boxes = [[0, 0, 60, 96], [50, 4.5, 118, 90]]
    both = pose(image, boxes=boxes)['predictions'][0]['instances']
    assert [one['bbox'] for one in both] == boxes
    single = pose(image, boxes=np.array(boxes[1:]), batch_size=4)['predictions'][0]['instances']
    assert_close(single[0]['keypoint_scores'], both[1]['keypoint_scores'])
    whole = pose(image)['predictions'][0]['instances']
    assert [one['bbox'] for one in whole] == [[0, 0, 120, 96]]
    # For each image its own, of different number; nobody is nobody.
    result = pose([image, image, image], boxes=[boxes, boxes[:1], []], batch_size=2, return_vis=1)
    assert [len(one['instances']) for one in result['predictions']] == [2, 1, 0]
    assert np.array_equal(result['visualization'][2], image[..., ::-1])
    one_for_all = pose([image, image], boxes=boxes[:1])['predictions']
    assert [len(one['instances']) for one in one_for_all] == [1, 1]


@needs('mmpose')
def test_radii_are_numbers(models, monkeypatch):
    """mmpose gives arrays of one number, which NumPy 2.4 refuses to turn into an int."""
    from mmpose.visualization import PoseLocalVisualizer

    radii, draw = [], PoseLocalVisualizer.draw_circles

    def draw_circles(self, center, radius, *args, **kwargs):
        radii.append(radius)
        return draw(self, center, radius, *args, **kwargs)

    monkeypatch.setattr(PoseLocalVisualizer, 'draw_circles', draw_circles)
    image = make_image(96, 120)
    for kpt_thr, drawn in ((2.0, False), (0.0, True)):
        picture = models['pose'](image, return_vis=True, kpt_thr=kpt_thr, radius=5)
        assert (picture['visualization'][0] != image[..., ::-1]).any() == drawn
    assert radii
    assert all(isinstance(radius, int) and radius == 5 for radius in radii)


@needs('mmpose')
def test_the_visualizer_of_a_stock_config_is_replaced():
    options = {'visualizer.type': 'PoseLocalVisualizer'}
    pose = mmhrformer.PoseInferencer(CONFIGS['pose'], False, cfg_options=options, device='cpu')
    assert type(pose.visualizer).__name__ == 'PoseVisualizer'


@needs('mmpose')
def test_images_of_another_size_than_the_decoder():
    options = {'model.head.decoder.input_size': (192, 256)}
    with pytest.raises(ValueError, match=r'fit the decoder: .*\.input_size=\(96, 128\), but'):
        mmhrformer.PoseInferencer(CONFIGS['pose'], False, cfg_options=options, device='cpu')


@needs('mmpose')
def test_heatmaps_with_offsets():
    options = {
        'model.head.out_channels': 3 * 17,
        'model.head.decoder.heatmap_type': 'combined',
        'model.test_cfg.flip_mode': 'udp_combined',
    }
    pose = mmhrformer.PoseInferencer(CONFIGS['pose'], False, cfg_options=options, device='cpu')
    check('pose', pose(make_image())['predictions'][0])
    assert number_of_outputs(pose.model) == 17


@needs('mmpose')
def test_keypoints_of_another_number():
    options = {'model.head.out_channels': 14, 'model.test_cfg.flip_test': False}
    with pytest.raises(ValueError, match=r'out_channels=14, but the metainfo .* has 17 keypoints'):
        mmhrformer.PoseInferencer(CONFIGS['pose'], False, cfg_options=options, device='cpu')


@pytest.mark.parametrize('key', [None, 'keypoint_id2name', 'flip_indices'])
def test_other_keypoints_in_the_checkpoint_are_told(key, monkeypatch):
    said, meta = [], dict(num_keypoints=2, keypoint_id2name={0: 'l', 1: 'r'}, flip_indices=[1, 0])
    monkeypatch.setattr('mmhrformer.inferencers.pose.print_log', lambda text, *_: said.append(text))
    check_keypoints(meta, 2, meta if key is None else {**meta, key: [0, 1]})
    assert [f'the {key} of the config'.lower() in text.lower() for text in said] == [True] * bool(
        key
    )


@pytest.mark.parametrize(
    ('boxes', 'message'),
    [
        ([[1, 2, 3]], r'boxes: an array of shape \(1, 3\); expected \(N, 4\)'),
        ([10, 10, 20, 20], r'boxes: an array of shape \(4,\)'),
        ([[10, 10, 5, 20]], r'boxes\[0\]=\[10.0, 10.0, 5.0, 20.0\]: a box without area'),
        ([[0, 0, 9, float('nan')]], 'a box without area'),
        (['person'], 'boxes'),
        (7, r'boxes: an array of shape \(\)|boxes=7'),
        ([[[0, 0, 9, 9]], [[0, 0, 9, 9]]], 'boxes: 2 lists for 1 images'),
        ([[[0, 0, 9]]], r'boxes\[0\]: an array of shape \(1, 3\)'),
    ],
)
def test_wrong_boxes(boxes, message, models):
    with pytest.raises(ValueError, match=message):
        models['pose'](make_image(), boxes=boxes)


def test_boxes_are_for_pose_and_instead_of_a_detector(models, monkeypatch):
    with pytest.raises(ValueError, match='SegInferencer takes whole images; remove boxes'):
        models['seg'](make_image(), boxes=[[0, 0, 9, 9]])
    monkeypatch.setattr(models['pose'], 'detector', object())
    with pytest.raises(ValueError, match='remove boxes, or build without a detector'):
        models['pose'](make_image(), boxes=[[0, 0, 9, 9]])


def test_box_arrays():
    assert check_boxes([], 'boxes').shape == (0, 4)
    assert check_boxes(((0, 1, 2, 3),), 'boxes').tolist() == [[0, 1, 2, 3]]


def test_people_found_by_mmdet():
    mmdet = pytest.importorskip('mmdet')
    config = Path(mmdet.__file__).parent / '.mim/configs/yolox/yolox_tiny_8xb8-300e_coco.py'
    pose = mmhrformer.PoseInferencer(
        CONFIGS['pose'], False, 'cpu', detector=str(config), detector_threshold=0.0
    )
    kept = []
    found = pose.detector(make_image(96, 120), return_datasamples=True)['predictions'][0]
    found.pred_instances = found.pred_instances[:0]
    from mmengine.structures import InstanceData

    found.pred_instances = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 50, 90], [40, 0, 90, 90], [5, 5, 20, 20]]),
        scores=torch.tensor([0.9, 0.2, 0.8]),
        labels=torch.tensor([0, 0, 16]),
    )
    pose.detector = lambda image, **options: kept.append(image) or dict(predictions=[found])
    pose.detector_threshold = 0.3
    (one,) = pose(make_image(96, 120))['predictions'][0]['instances']
    assert one['bbox'] == [0, 0, 50, 90]  # the other is unlikely, the third a dog
    assert one['bbox_score'] == pytest.approx(0.9)
    assert kept[0].shape == (96, 120, 3)


@needs('mmpose', 'mmdet')
def test_detector_without_a_network(monkeypatch):
    from urllib.error import URLError

    def refuse(*args, **kwargs):
        raise URLError('no route to host')

    monkeypatch.setattr('mmdet.apis.DetInferencer', refuse)
    words = r'detector=.*: cannot download its weights \(no route to host\).* https://.*\.pth in'
    with pytest.raises(OSError, match=words):
        mmhrformer.PoseInferencer(CONFIGS['pose'], False, 'cpu', detector=True)


@needs('mmpose')
def test_detector_without_mmdet_or_without_name(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, 'mmdet.apis', None)
    with pytest.raises(ImportError, match=r'detector=True needs mmdet: pip install'):
        mmhrformer.PoseInferencer(CONFIGS['pose'], False, 'cpu', detector=True)
    with pytest.raises(ValueError, match=r"detector_weights='a\.pth' without a detector"):
        mmhrformer.PoseInferencer(CONFIGS['pose'], False, 'cpu', detector_weights='a.pth')
    with pytest.raises(ValueError, match=r'detector_threshold=0\.5 without a detector'):
        mmhrformer.PoseInferencer(CONFIGS['pose'], False, 'cpu', detector_threshold=0.5)

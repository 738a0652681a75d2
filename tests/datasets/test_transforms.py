"""The official segmentation augmentation."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from mmcv.transforms import KeyMapper, RandomApply, RandomChoice, TransformBroadcaster
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from needs import needs
from PIL import Image

from mmhrformer import TRANSFORMS
from mmhrformer.configs import config_root
from mmhrformer.datasets import (
    PlaceRandomly,
    RandomBoxShift,
    RandomBrightness,
    RandomScaleAspect,
    RandomScaleRotation,
)

SIZE = (60, 100)


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    return dict(
        img=rng.integers(0, 256, (*SIZE, 3), np.uint8),
        gt_seg_map=rng.integers(0, 19, SIZE, np.uint8),
        seg_fields=['gt_seg_map'],
    )


def test_sizes_follow_scale_and_aspect(sample):
    """Sizes and pixels as OpenCV makes them from the numbers that were drawn."""
    np.random.seed(3)
    scale, aspect = np.random.uniform(0.5, 2.0), np.random.uniform(0.9, 1.1)
    size = int(SIZE[1] * scale * aspect**0.5), int(SIZE[0] * scale / aspect**0.5)
    image = cv2.resize(sample['img'], size, interpolation=cv2.INTER_CUBIC)
    labels = cv2.resize(sample['gt_seg_map'], size, interpolation=cv2.INTER_NEAREST)
    np.random.seed(3)
    out = RandomScaleAspect()(sample)
    assert np.array_equal(out['img'], image)
    assert np.array_equal(out['gt_seg_map'], labels)
    assert out['img_shape'] == size[::-1]


def test_sizes_cover_the_range(sample):
    shapes = np.array([RandomScaleAspect()(dict(sample))['img'].shape[:2] for _ in range(300)])
    areas = np.sqrt(shapes.prod(1) / np.prod(SIZE))
    assert 0.48 < areas.min() < 0.6
    assert 1.9 < areas.max() <= 2.0
    ratios = shapes[:, 1] / shapes[:, 0] / (SIZE[1] / SIZE[0])
    assert 0.86 < ratios.min() < 0.93
    assert 1.07 < ratios.max() < 1.14


def test_brightness_shifts_all_channels_alike(sample):
    image = sample['img'].copy()
    shifts = set()
    for _ in range(200):
        out = RandomBrightness(10)(dict(sample))['img'].astype(int)
        inside = (image >= 10) & (image <= 245)
        (shift,) = set((out - image)[inside])
        assert np.array_equal(out, np.clip(image.astype(int) + shift, 0, 255))
        shifts.add(shift)
    assert shifts == set(range(-10, 11))


def test_small_images_are_placed_anywhere_on_the_color(sample):
    corners = set()
    for _ in range(100):
        out = PlaceRandomly((64, 102), (1.5, 2.5, 3.5))(dict(sample))
        assert out['img'].shape == (64, 102, 3)
        assert out['img_shape'] == (64, 102)
        around = out['gt_seg_map'] == 255
        assert around.sum() == 64 * 102 - 60 * 100
        assert np.array_equal(np.unique(out['img'][around], axis=0), [[1.5, 2.5, 3.5]])
        ys, xs = np.nonzero(~around)
        corners.add((ys[0], xs[0]))
        image = out['img'][ys[0] : ys[0] + 60, xs[0] : xs[0] + 100]
        assert np.array_equal(image, sample['img'])
    assert corners == {(y, x) for y in range(5) for x in range(3)}


def test_large_images_are_left_as_they_are(sample):
    out = PlaceRandomly((50, 80), (0, 0, 0))(dict(sample))
    assert np.array_equal(out['img'], sample['img'])
    assert np.array_equal(out['gt_seg_map'], sample['gt_seg_map'])


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: RandomScaleAspect(scale_range=(2, 1)), 'scale_range'),
        (lambda: RandomScaleAspect(aspect_range=(0, 1)), 'aspect_range'),
        (lambda: RandomBrightness(-1), 'shift=-1'),
        (lambda: PlaceRandomly((0, 5), (0, 0, 0)), 'size'),
    ],
)
def test_impossible_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize('value', [-1, 256])
def test_labels_that_the_data_type_lacks_are_refused(sample, value):
    place = PlaceRandomly((64, 102), (0, 0, 0), value)
    with pytest.raises(ValueError, match=rf'{value} for gt_seg_map of uint8.* from 0 to 255'):
        place(dict(sample))
    labels = sample['gt_seg_map'].astype(np.int16)
    assert value in place(dict(sample, gt_seg_map=labels))['gt_seg_map']


@needs('mmseg')
def test_pipeline_of_the_cityscapes_config(sample):
    """The config's pipeline, in mmseg's scope, up to packed inputs of the crop's size."""
    cfg = Config.fromfile(config_root() / '_base_/datasets/cityscapes_512x1024.py')
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert TRANSFORMS.get('RandomScaleAspect') is RandomScaleAspect
        pipeline = Compose(cfg.train_pipeline[2:])
        out = pipeline(dict(sample, reduce_zero_label=False))
    assert out['inputs'].shape == (3, 512, 1024)
    assert out['data_samples'].gt_sem_seg.data.shape == (1, 512, 1024)


def boxes(number: int) -> dict:
    return dict(bbox_scale=np.full((number, 2), 100.0, np.float32))


def test_boxes_are_scaled_and_rotated_by_clipped_normal_numbers():
    np.random.seed(0)
    out = RandomScaleRotation()(boxes(20000))
    scale, rotation = out['bbox_scale'][:, 0] / 100, out['bbox_rotation']
    assert np.array_equal(out['bbox_scale'][:, 0], out['bbox_scale'][:, 1])
    assert (scale.min(), scale.max()) == pytest.approx((0.5, 1.5))
    # 16 % of a normal distribution lie beyond one standard deviation on either side, 2.3 % beyond
    # two; clipped, they all lie at the limits.
    assert np.isclose(scale, 0.5).mean() == pytest.approx(0.159, abs=0.01)
    assert np.isclose(scale, 1.5).mean() == pytest.approx(0.159, abs=0.01)
    assert (rotation == 0).mean() == pytest.approx(0.4, abs=0.01)
    assert (rotation == 80).mean() == pytest.approx(0.6 * 0.0228, abs=0.005)
    assert (rotation.min(), rotation.max()) == (-80, 80)
    turned = rotation[rotation != 0]
    assert turned.std() == pytest.approx(40 * 0.959, rel=0.02)
    assert np.corrcoef(scale, rotation)[0, 1] == pytest.approx(0, abs=0.03)


def test_boxes_are_shifted_by_a_fifth_of_their_sides_without_padding():
    np.random.seed(0)
    size = np.float32([(125, 250)] * 20000)  # of boxes of 100 x 200, padded by 1.25
    out = RandomBoxShift()(dict(bbox_center=np.full((20000, 2), 50, np.float32), bbox_scale=size))
    shift = (out['bbox_center'] - 50) / (100, 200)
    moved = (shift != 0).any(axis=1)
    assert moved.mean() == pytest.approx(0.3, abs=0.01)
    assert (shift.min(), shift.max()) == pytest.approx((-0.2, 0.2), abs=1e-3)
    assert shift[moved].std(axis=0) == pytest.approx([0.4 / 12**0.5] * 2, rel=0.02)  # uniform
    assert np.corrcoef(shift[moved].T)[0, 1] == pytest.approx(0, abs=0.03)
    assert out['bbox_center'].dtype == np.float32
    assert np.array_equal(out['bbox_scale'], size)


def test_no_change_is_possible():
    center = np.float32([(3, 4)] * 5)
    assert np.array_equal(
        RandomBoxShift(prob=0)(dict(boxes(5), bbox_center=center))['bbox_center'], center
    )
    out = RandomScaleRotation(scale_std=0, rotation_prob=0)(boxes(5))
    assert np.array_equal(out['bbox_scale'], boxes(5)['bbox_scale'])
    assert not out['bbox_rotation'].any()
    assert out['bbox_rotation'].shape == (5,)


@pytest.mark.parametrize(
    ('kind', 'options'),
    [
        (RandomScaleRotation, dict(scale_std=1)),
        (RandomScaleRotation, dict(rotation_std=-1)),
        (RandomScaleRotation, dict(rotation_prob=1.5)),
        (RandomBoxShift, dict(shift=-0.1)),
        (RandomBoxShift, dict(prob=2)),
    ],
)
def test_impossible_changes_are_refused(kind, options):
    with pytest.raises(ValueError, match='{}={}'.format(*next(iter(options.items())))):
        kind(**options)


@pytest.mark.parametrize('size', [(0.0, 10.0), (10.0, 0.0), (10.0, -1.0), (float('nan'), 10.0)])
def test_boxes_without_a_size_are_named(size):
    results = dict(boxes(2), bbox_scale=np.float32([(10, 10), size]), img_path='a.jpg')
    with pytest.raises(ValueError, match=r'bbox_scale=\[\[10.0, 10.0\].* from a\.jpg: boxes must'):
        RandomScaleRotation()(results)


class TestWhyALabelMapDoesNotFit:
    @pytest.fixture
    def photo(self, tmp_path):
        """A file of 30 x 40 pixels that EXIF tells to turn on its side, or not."""

        def make(orientation: int) -> str:
            image = Image.new('RGB', (40, 30))
            exif = image.getexif()
            exif[0x0112] = orientation
            image.save(tmp_path / 'photo.jpg', exif=exif)
            return str(tmp_path / 'photo.jpg')

        return make

    @pytest.mark.parametrize('transform', [RandomScaleAspect(), PlaceRandomly((60, 60), (0, 0, 0))])
    def test_causes(self, transform, photo):
        upright, lying = np.zeros((40, 30, 3), np.uint8), np.zeros((30, 40, 3), np.uint8)
        flat = np.zeros((30, 40), np.uint8)
        for orientation, image, labels, words in (
            (1, lying, lying, "a color image.*imdecode_backend='pillow'"),
            (1, lying, np.zeros((30, 40, 4), np.uint8), 'a color image'),
            (1, lying, flat.astype(np.float32), 'classes are integers'),
            (6, upright, flat, "rotated by its EXIF .*'color_ignore_orientation'"),
            (8, lying, flat.T, "label map was rotated by the EXIF .*color_type='color'"),
            (3, lying, flat.T, 'height and width are swapped'),
            (6, lying, flat[1:], 'as large as their images'),
        ):
            path = photo(orientation)
            sample = dict(img=image, img_path=path, gt_seg_map=labels, seg_fields=['gt_seg_map'])
            with pytest.raises(ValueError, match=rf'gt_seg_map of shape .*photo\.jpg: .*{words}'):
                transform(sample)

    def test_without_a_file_the_shapes_tell(self):
        sample = dict(img=np.zeros((40, 30, 3), np.uint8), gt_seg_map=np.zeros((30, 40), np.uint8))
        with pytest.raises(ValueError, match='height and width are swapped'):
            RandomScaleAspect()(dict(sample, seg_fields=['gt_seg_map']))

    @needs('mmseg')
    def test_what_the_stock_loader_makes_of_masks(self, tmp_path):
        """Colors as they are read; a palette as numbers, or as colors by another backend."""
        mask = Image.new('P', (40, 30))
        mask.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
        mask.save(tmp_path / 'palette.png')
        mask.convert('RGB').save(tmp_path / 'colors.png')
        sample = dict(img=np.zeros((30, 40, 3), np.uint8))
        loads = dict(type='LoadAnnotations', reduce_zero_label=False)
        for name, backend, good in (
            ('palette.png', 'pillow', True),
            ('palette.png', 'cv2', False),
            ('colors.png', 'pillow', False),
        ):
            with DefaultScope.overwrite_default_scope('mmseg'):
                both = Compose([dict(loads, imdecode_backend=backend), RandomScaleAspect()])
            given = dict(
                sample,
                seg_map_path=str(tmp_path / name),
                reduce_zero_label=False,
                seg_fields=[],
            )
            if good:
                assert both(given)['gt_seg_map'].ndim == 2
            else:
                with pytest.raises(ValueError, match='a color image'):
                    both(given)


def test_gray_images(sample):
    gray = sample['img'][..., 0]
    assert RandomScaleAspect((1, 1), (1, 1))(dict(sample, img=gray))['img'].shape == SIZE
    assert RandomBrightness()(dict(sample, img=gray))['img'].shape == SIZE
    placed = PlaceRandomly((80, 120), (7,))(dict(sample, img=gray))
    assert placed['img'].shape == (80, 120, 1)
    assert placed['gt_seg_map'].shape == (80, 120)


# ---------------------------------------------------------------- several images alike


OURS = {
    'scale': dict(type='mmhrformer.RandomScaleAspect'),
    'brightness': dict(type='mmhrformer.RandomBrightness'),
    'place': dict(type='mmhrformer.PlaceRandomly', size=(200, 300), pad_val=(1, 2, 3)),
}
BOXES = dict(type='mmhrformer.RandomScaleRotation')


def share(transforms: list, **keys) -> dict:
    return TransformBroadcaster(transforms, auto_remap=True, share_random_params=True, mapping=keys)


@pytest.mark.parametrize('kind', [*OURS, 'all', 'apply', 'choice', 'mapped'])
def test_images_share_random_numbers_where_they_shall(sample, kind, monkeypatch):
    # mmcv lists a method twice as soon as a framework's subclass has it, and then refuses it.
    monkeypatch.setattr(RandomChoice, '_methods_with_randomness', ['random_pipeline_index'])
    steps = list(OURS.values())
    transforms = {
        'all': steps,
        'apply': [RandomApply(steps, prob=0.5)],
        'choice': [RandomChoice([[step] for step in steps])],
        'mapped': [KeyMapper(steps, mapping=dict(img='img'), auto_remap=True)],
    }.get(kind, [OURS.get(kind)])
    transform = share(transforms, img='img', gt_seg_map='gt_seg_map')
    results = []
    for _ in range(20):
        pair = dict(img=[sample['img']] * 2, gt_seg_map=[sample['gt_seg_map']] * 2)
        out = transform(dict(pair, seg_fields=['gt_seg_map']))
        assert np.array_equal(*out['img'])
        assert np.array_equal(*out['gt_seg_map'])
        results.append((out['img'][0].shape, out['img'][0].tobytes()))
    assert len(set(results)) > 2  # but not always the same


def test_boxes_share_random_numbers_where_they_shall():
    transform = TransformBroadcaster([BOXES], share_random_params=True)
    for _ in range(20):
        out = transform(dict(bbox_scale=[np.full((3, 2), 100.0), np.full((3, 2), 50.0)]))
        assert np.array_equal(out['bbox_scale'][0], 2 * out['bbox_scale'][1])
        assert np.array_equal(*out['bbox_rotation'])
        assert len(np.unique(out['bbox_scale'][0])) > 1
    with pytest.raises(ValueError, match='got 2 boxes from the sample and 3 from another'):
        transform(dict(bbox_scale=[np.full((3, 2), 100.0), np.full((2, 2), 100.0)]))


def test_boxes_share_a_shift_where_they_shall():
    shift = TransformBroadcaster([RandomBoxShift(prob=1)], share_random_params=True)
    center = np.zeros((3, 2), np.float32)
    pair = dict(bbox_center=[center, center], bbox_scale=[center + 100, center + 50])
    one, other = shift(pair)['bbox_center']
    assert np.allclose(one, 2 * other)
    assert len(np.unique(one)) == 6
    with pytest.raises(ValueError, match=r'RandomBoxShift got 2 boxes .* and 3 from another'):
        shift(dict(pair, bbox_scale=[center + 100, center[:2] + 100]))


def test_images_of_several_sizes_share_a_place(sample):
    small = dict(img=[sample['img'], sample['img'][:20, :30], sample['img']])
    transform = share([OURS['place']], img='img')
    for _ in range(20):
        one, other, third = transform(dict(small))['img']
        assert one.shape == other.shape == (200, 300, 3)
        assert np.array_equal(one, third)
        place = np.argwhere((one != (1, 2, 3)).any(2)).min(0)
        assert np.array_equal(np.argwhere((other != (1, 2, 3)).any(2)).min(0), place)
    for _ in range(20):  # the place of the small image may be too far for the larger one
        large_last = dict(img=[sample['img'][:20, :30], sample['img']])
        other, one = transform(large_last)['img']
        places = [np.argwhere((image != (1, 2, 3)).any(2)).min(0) for image in (one, other)]
        spare = np.subtract((200, 300), sample['img'].shape[:2])
        assert np.array_equal(places[0], np.minimum(places[1], spare))


def test_numbers_are_drawn_in_the_same_order_as_ever(sample):
    np.random.seed(3)
    drawn = np.random.randint(141), np.random.randint(201)
    np.random.seed(3)
    out = TRANSFORMS.build(OURS['place'])(sample)['img']
    assert tuple(np.argwhere((out != (1, 2, 3)).any(2)).min(0)) == drawn

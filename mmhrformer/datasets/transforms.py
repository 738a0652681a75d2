"""Augmentations of the official codes that mmpose and mmsegmentation do not have.

Random numbers are drawn in separate methods, which ``TransformBroadcaster`` with
``share_random_params=True`` calls once for all images of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from PIL import ExifTags, Image

from ..registry import TRANSFORMS


def _check_range(name: str, value: Sequence[float]) -> tuple[float, float]:
    """Check a pair of positive, ordered numbers."""
    good = isinstance(value, Sequence) and len(value) == 2
    if not (good and all(isinstance(v, Real) for v in value) and 0 < value[0] <= value[1]):
        raise ValueError(f'{name}={value!r}: expected two numbers, 0 < lowest <= highest')
    return tuple(value)


def _check_number(name: str, value: float, low: float, high: float, kind: type = Real) -> None:
    """Check a number against bounds, inclusive."""
    if not (isinstance(value, kind) and low <= value <= high):
        what = 'an integer' if kind is Integral else 'a number'
        raise ValueError(f'{name}={value!r}: expected {what} from {low} to {high}')


def _check_image(transform: BaseTransform, results: dict) -> None:
    """Check the image of a sample and its label maps, for clearer errors than the libraries'."""
    name, where = type(transform).__name__, results.get('img_path', 'the sample')
    image = results.get('img')
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or not image.size:
        what = f'shape {image.shape}' if isinstance(image, np.ndarray) else repr(image)
        raise ValueError(
            f'{name} got an image of {what} from {where}: expected a non-empty array (H, W, 3), or '
            '(H, W) if it is gray. Put LoadImageFromFile first, and remove damaged files from the '
            'dataset'
        )
    for key in results.get('seg_fields', []):
        if wrong := _find_mismatch(results[key], image, results.get('img_path')):
            raise ValueError(
                f'{name} got {key} of shape {results[key].shape} and type {results[key].dtype} for '
                f'an image of {image.shape[:2]} from {where}: {wrong}'
            )


def _check_shared(transform: BaseTransform, results: dict, boxes: int, drawn: int) -> None:
    """Check that random numbers, which several samples may share, are as many as the boxes."""
    if boxes != drawn:
        raise ValueError(
            f'{type(transform).__name__} got {boxes} boxes from '
            f'{results.get("img_path", "the sample")} and {drawn} from another: with '
            'share_random_params=True, all images must have the same number of boxes'
        )


def _find_mismatch(labels: np.ndarray, image: np.ndarray, path: str | None) -> str:
    """Why a label map does not match its image, with the remedy; empty if it does."""
    if labels.ndim != 2:
        return (
            'a label map holds a class index for each pixel, but this is a color image. If its PNG '
            "has a palette, set imdecode_backend='pillow' in LoadAnnotations, which reads the "
            'indices; otherwise write masks of one channel, with each color replaced by its class'
        )
    if labels.dtype.kind not in 'ui':
        return 'classes are integers; write 8-bit masks'
    height, width = image.shape[:2]
    if labels.shape == (height, width):
        return ''
    if labels.shape != (width, height):
        return 'label maps must be as large as their images; check that they belong together'
    stored = _stored_size_if_turned(path)
    if stored is None:
        return 'height and width are swapped: one of the two is transposed, write it again'
    if (stored[0] > stored[1]) == (height > width):
        return (
            'the label map was rotated by the EXIF orientation of the photo, but the photo was '
            "not: load it with color_type='color' in every pipeline"
        )
    return (
        'the photo was rotated by its EXIF orientation, but its label map was not: load it with '
        "color_type='color_ignore_orientation' in every pipeline, or rotate the label map"
    )


def _stored_size_if_turned(path: str | None) -> tuple[int, int] | None:
    """Stored height and width of a photo that EXIF rotates by 90 degrees, otherwise None."""
    try:
        with Image.open(path) as photo:
            sideways = photo.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return photo.size[::-1] if sideways else None
    except (AttributeError, OSError, SyntaxError, ValueError):  # not a readable local file
        return None


@TRANSFORMS.register_module()
class RandomScaleAspect(BaseTransform):
    """Resize by a random scale and a random aspect ratio.

    Width and height are multiplied by ``scale * sqrt(aspect)`` and ``scale / sqrt(aspect)`` and
    rounded down, with scale and aspect drawn uniformly. Images are resized bicubically, label maps
    by nearest neighbor.

    Required keys: ``img``, and the names in ``seg_fields``. Modified keys: the same,
    ``img_shape``.

    Args:
        scale_range (Sequence[float]): Lowest and highest scale. Defaults to (0.5, 2.0), official.
        aspect_range (Sequence[float]): Lowest and highest aspect ratio. Defaults to (0.9, 1.1),
            official.
    """

    def __init__(
        self,
        scale_range: Sequence[float] = (0.5, 2.0),
        aspect_range: Sequence[float] = (0.9, 1.1),
    ) -> None:
        self.scale_range = _check_range('scale_range', scale_range)
        self.aspect_range = _check_range('aspect_range', aspect_range)

    @cache_randomness
    def _draw(self) -> tuple[float, float]:
        return np.random.uniform(*self.scale_range), np.random.uniform(*self.aspect_range)

    def transform(self, results: dict) -> dict:
        """Resize the image, (H, W, 3) or (H, W), and its label maps (H, W).

        Raises:
            ValueError: If there is no such image, or a label map does not match it.
        """
        _check_image(self, results)
        scale, aspect = self._draw()
        stretch = aspect**0.5
        height, width = results['img'].shape[:2]
        size = max(1, int(width * scale * stretch)), max(1, int(height * scale / stretch))
        results['img'] = mmcv.imresize(results['img'], size, interpolation='bicubic')
        for key in results.get('seg_fields', []):
            results[key] = mmcv.imresize(results[key], size, interpolation='nearest')
        results['img_shape'] = results['img'].shape[:2]
        return results

    def __repr__(self) -> str:
        ranges = f'scale_range={self.scale_range}, aspect_range={self.aspect_range}'
        return f'{type(self).__name__}({ranges})'


@TRANSFORMS.register_module()
class RandomBrightness(BaseTransform):
    """Add one random integer to all channels of an image.

    Required and modified key: ``img`` (uint8).

    Args:
        shift (int): Largest magnitude of the integer. Defaults to 10 (official).
    """

    def __init__(self, shift: int = 10) -> None:
        _check_number('shift', shift, 0, 255, Integral)
        self.shift = shift

    @cache_randomness
    def _draw(self) -> int:
        return np.random.randint(-self.shift, self.shift + 1)

    def transform(self, results: dict) -> dict:
        """Shift the image, (H, W, 3) or (H, W), values from 0 to 255.

        Raises:
            ValueError: If there is no such image, it is not uint8, or a label map does not match.
        """
        _check_image(self, results)
        if results['img'].dtype != np.uint8:
            raise ValueError(
                f'RandomBrightness got an image of {results["img"].dtype}: expected uint8. Put it '
                'before steps that change the data type, such as PlaceRandomly or Normalize'
            )
        results['img'] = np.clip(results['img'].astype(np.int16) + self._draw(), 0, 255).astype(
            np.uint8
        )
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(shift={self.shift})'


@TRANSFORMS.register_module()
class PlaceRandomly(BaseTransform):
    """Pad an image that is smaller than the crop, placing it at random.

    The image becomes float32, so that padding with the mean color is exactly 0 after normalization.

    Required keys: ``img``, and the names in ``seg_fields``. Modified keys: the same,
    ``img_shape``, ``pad_shape``.

    Args:
        size (Sequence[int]): Height and width of the crop; larger images are not changed.
        pad_val (Sequence[float]): Padding color, in the image's channel order.
        seg_pad_val (int): Padding label. Defaults to 255, which is ignored.
    """

    def __init__(
        self, size: Sequence[int], pad_val: Sequence[float], seg_pad_val: int = 255
    ) -> None:
        good = isinstance(size, Sequence) and len(size) == 2
        if not good or not all(isinstance(side, Integral) and side > 0 for side in size):
            raise ValueError(f'size={size!r}: expected height and width, positive integers')
        color = pad_val if np.iterable(pad_val) else [None]
        if not all(isinstance(value, Real) and np.isfinite(value) for value in color):
            raise ValueError(f'pad_val={pad_val!r}: expected one number per channel')
        if not isinstance(seg_pad_val, Integral):
            raise ValueError(f'seg_pad_val={seg_pad_val!r}: expected an integer, such as 255')
        self.size = tuple(size)
        self.pad_val = tuple(pad_val)
        self.seg_pad_val = seg_pad_val

    @cache_randomness
    def _draw(self, spare: tuple[int, int]) -> tuple[int, int]:
        return np.random.randint(spare[0] + 1), np.random.randint(spare[1] + 1)

    def transform(self, results: dict) -> dict:
        """Place the image, (H, W, C) or (H, W), and its label maps (H, W) alike.

        Raises:
            ValueError: If there is no such image, a label map does not match it, ``pad_val``
                has another number of channels, or the data type of the labels lacks
                ``seg_pad_val``.
        """
        _check_image(self, results)
        image = np.atleast_3d(results['img']).astype(np.float32)
        if image.shape[2] != len(self.pad_val):
            raise ValueError(
                f'pad_val={self.pad_val} for an image of {image.shape[2]} channels: expected one '
                'number per channel'
            )
        height, width = image.shape[:2]
        padded = max(height, self.size[0]), max(width, self.size[1])
        spare = padded[0] - height, padded[1] - width
        # Images of different sizes may share the position, which is clipped for some.
        top, left = map(min, self._draw(spare), spare)
        place = slice(top, top + height), slice(left, left + width)
        results['img'] = np.empty((*padded, len(self.pad_val)), np.float32)
        results['img'][:] = self.pad_val
        results['img'][place] = image
        for key in results.get('seg_fields', []):
            bounds = np.iinfo(results[key].dtype)
            if not bounds.min <= self.seg_pad_val <= bounds.max:  # NumPy 1 would wrap it around
                raise ValueError(
                    f'seg_pad_val={self.seg_pad_val} for {key} of {bounds.dtype}: expected a '
                    f'number from {bounds.min} to {bounds.max}, such as 255'
                )
            labels = np.full(padded, self.seg_pad_val, results[key].dtype)
            labels[place] = results[key]
            results[key] = labels
        results['img_shape'] = results['pad_shape'] = padded
        return results

    def __repr__(self) -> str:
        values = f'size={self.size}, pad_val={self.pad_val}, seg_pad_val={self.seg_pad_val}'
        return f'{type(self).__name__}({values})'


@TRANSFORMS.register_module()
class RandomBoxShift(BaseTransform):
    """Shift the boxes of people at random, as the official pose code does.

    There, the dataset does so when it loads the annotations, so that a box is shifted alike in all
    epochs; here, each epoch draws anew. mmpose's ``RandomBBoxTransform`` draws from a truncated
    normal distribution instead of a uniform one, and also shifts the boxes of half bodies.

    Required keys: ``bbox_center`` (N, 2), ``bbox_scale`` (N, 2). Modified key: ``bbox_center``.

    Args:
        shift (float): Largest shift in each direction, as a fraction of the side of the box with
            its padding, from 0 to 1. Defaults to 0.16 (official): a fifth of the side without the
            padding of 1.25.
        prob (float): Probability that a box is shifted. Defaults to 0.3 (official).
    """

    def __init__(self, shift: float = 0.16, prob: float = 0.3) -> None:
        _check_number('shift', shift, 0, 1)
        _check_number('prob', prob, 0, 1)
        self.shift = shift
        self.prob = prob

    @cache_randomness
    def _draw(self, number: int) -> np.ndarray:
        shift = np.random.uniform(-self.shift, self.shift, (number, 2))
        return np.where(np.random.rand(number, 1) < self.prob, shift, 0)

    def transform(self, results: dict) -> dict:
        """Shift the boxes, each by its own fraction of its sides.

        Raises:
            ValueError: If samples that share random parameters have different numbers of boxes.
        """
        sizes = results['bbox_scale']
        shift = self._draw(len(sizes))
        _check_shared(self, results, len(sizes), len(shift))
        results['bbox_center'] = (results['bbox_center'] + sizes * shift).astype(np.float32)
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(shift={self.shift}, prob={self.prob})'


@TRANSFORMS.register_module()
class RandomScaleRotation(BaseTransform):
    """Scale and rotate the boxes of people at random, as the official pose code does.

    Scales are drawn from a normal distribution around 1, rotations from one around 0; scales are
    clipped at one standard deviation, rotations at two. mmpose's ``RandomBBoxTransform`` draws from
    truncated distributions, which make the largest changes rarer.

    Required key: ``bbox_scale`` (N, 2). Modified keys: ``bbox_scale``, ``bbox_rotation`` (N,).

    Args:
        scale_std (float): Standard deviation of the scale, from 0 to below 1. Defaults to 0.5
            (official): scales from 0.5 to 1.5.
        rotation_std (float): Standard deviation of the rotation, in degrees. Defaults to 40
            (official): rotations from -80 to 80.
        rotation_prob (float): Probability that a box is rotated. Defaults to 0.6 (official).
    """

    def __init__(
        self, scale_std: float = 0.5, rotation_std: float = 40.0, rotation_prob: float = 0.6
    ) -> None:
        if not (isinstance(scale_std, Real) and 0 <= scale_std < 1):
            raise ValueError(f'scale_std={scale_std!r}: expected a number from 0 to below 1')
        _check_number('rotation_std', rotation_std, 0, 90)
        _check_number('rotation_prob', rotation_prob, 0, 1)
        self.scale_std = scale_std
        self.rotation_std = rotation_std
        self.rotation_prob = rotation_prob

    @cache_randomness
    def _draw(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        scale = 1 + self.scale_std * np.random.randn(number, 1).clip(-1, 1)
        rotation = self.rotation_std * np.random.randn(number).clip(-2, 2)
        return scale, np.where(np.random.rand(number) < self.rotation_prob, rotation, 0)

    def transform(self, results: dict) -> dict:
        """Change the boxes, each by its own scale and rotation.

        Raises:
            ValueError: If a box has no size, or samples that share random parameters have
                different numbers of boxes.
        """
        sizes = results['bbox_scale']
        if not (np.isfinite(sizes) & (sizes > 0)).all():
            raise ValueError(
                f'RandomScaleRotation got bbox_scale={np.asarray(sizes).tolist()} from '
                f'{results.get("img_path", "the sample")}: boxes must have positive width and '
                'height. Correct or remove the annotation'
            )
        scale, rotation = self._draw(len(sizes))
        _check_shared(self, results, len(sizes), len(rotation))
        results['bbox_scale'] = (sizes * scale).astype(np.float32)
        results['bbox_rotation'] = rotation.astype(np.float32)
        return results

    def __repr__(self) -> str:
        values = f'rotation_std={self.rotation_std}, rotation_prob={self.rotation_prob}'
        return f'{type(self).__name__}(scale_std={self.scale_std}, {values})'

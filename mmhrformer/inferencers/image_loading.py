"""Loading of images as in the test pipeline of a config, and conversion for drawing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import cv2
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS

from ..configs import name_of_type
from .media import Picture, check_file, local_file, reason

STOCK = {'mmcv', 'mmpretrain', 'mmpose', 'mmseg'}  # their loading steps do not modify arrays
LABELS = {'LoadAnnotations', 'LoadDepthAnnotation'}  # steps that need labels
# Arrays that the loading step may return, by their number of channels.
EXPECTED = {
    3: '(height, width, 3) uint8 in the order blue, green, red, as cv2.imread returns it',
    1: '(height, width) uint8, as cv2.imread(FILE, cv2.IMREAD_GRAYSCALE) returns it',
    None: '(height, width) or (height, width, channels) numbers, as cv2.imread(FILE, '
    'cv2.IMREAD_UNCHANGED) returns them',
}


class Loader:
    """The loading step of a test pipeline.

    Args:
        step (LoadImageFromFile, optional): The step. Defaults to None: color, by OpenCV.

    Attributes:
        channels (int, optional): Channels of the loaded images; None if they vary.

    Raises:
        ValueError: If the step needs a package that is not installed.

    Examples:
        >>> Loader(LoadImageFromFile(color_type='grayscale')).take(np.zeros((4, 6), np.uint8)).shape
        (4, 6)
    """

    def __init__(self, step: LoadImageFromFile | None = None) -> None:
        self.step = step or LoadImageFromFile()
        backend = self.step.imdecode_backend
        package = dict(tifffile='tifffile', turbojpeg='PyTurboJPEG').get(backend)
        if package and importlib.util.find_spec(backend) is None:
            raise ValueError(
                f'model: its test pipeline loads images with imdecode_backend={backend!r}, which '
                f'is not installed: pip install {package}'
            )
        flag = self.step.color_type  # a name, or a flag of OpenCV
        self.channels = None
        if backend == 'tifffile':  # ignores the flag
            return
        if flag == cv2.IMREAD_GRAYSCALE or str(flag).startswith('grayscale'):
            self.channels = 1
        elif flag == cv2.IMREAD_COLOR or 'color' in str(flag):
            self.channels = 3

    def load(self, picture: Picture) -> np.ndarray:
        """Return the output of the step, such as (H, W, 3) uint8 in BGR."""
        pixels = picture.source
        if isinstance(pixels, np.ndarray):
            if picture.is_frame and self.channels == 1:
                pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
            return self.take(pixels)
        with local_file(picture.source) as path:
            check_file(path)
            return self.read(path)

    def read(self, file: Path) -> np.ndarray:
        """Load a file that has been checked."""
        try:
            results = self.step(dict(img_path=str(file)))
            return results['img']  # None if ignore_empty hides an error
        except Exception as err:  # from the file, its storage, or the step
            details = '' if isinstance(err, AssertionError) else f' ({reason(err)})'
            raise ValueError(
                f'{self.step} cannot read it{details}: convert it, for example to PNG'
            ) from err

    def take(self, pixels: np.ndarray) -> np.ndarray:
        """Convert an array to type and shape of the step's output; refuse unsuitable ones."""
        if type(self.step).__module__.split('.')[0] not in STOCK:
            raise ValueError(
                f'an array; the test pipeline loads files by {self.step}, which may process them '
                'further. Pass the paths of the images'
            )
        if not self._returns(pixels):
            usual = self.channels == 3 and not self.step.to_float32
            raise ValueError(
                f'an array of shape {pixels.shape} and type {pixels.dtype}; expected '
                f'{EXPECTED[self.channels]}'
                + ('' if usual else f'; the test pipeline loads by {self.step}')
            )
        pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        return pixels.astype(np.float32) if self.step.to_float32 else pixels

    def _returns(self, pixels: np.ndarray) -> bool:
        """Whether the step could return an array."""
        if not pixels.size or pixels.ndim not in (2, 3):
            return False
        if self.channels is None:
            return pixels.dtype.kind in 'uif'
        if self.channels != (pixels.shape[2] if pixels.ndim == 3 else 1):
            return False
        if pixels.dtype == np.uint8:
            return True
        # 8-bit numbers as float32, to which the step converts files.
        whole = (pixels >= 0) & (pixels <= 255) & (pixels == np.rint(pixels))
        return bool(self.step.to_float32 and whole.all())


def split_pipeline(pipeline: list[dict]) -> tuple[Loader, Compose]:
    """Build a test pipeline in two parts: loading of images, and further steps without labels."""
    steps = [TRANSFORMS.build(step) for step in pipeline if name_of_type(step) not in LABELS]
    if steps and isinstance(steps[0], LoadImageFromFile):
        return Loader(steps[0]), Compose(steps[1:])
    for step in steps:
        if re.search('Load.*Image', type(step).__name__):
            raise ValueError(
                f'model: its test pipeline loads images by {type(step).__name__}; only '
                'LoadImageFromFile and its subclasses are supported, as the first step. Use '
                'python -m mmhrformer test'
            )
    return Loader(), Compose(steps)  # the dataset holds arrays


def displayable(image: np.ndarray) -> np.ndarray:
    """Convert an array of any bit depth and number of channels to a picture for drawing.

    Args:
        image (np.ndarray): (H, W) or (H, W, C). With three or more channels, the first three are
            blue, green and red; otherwise, the first is gray.

    Returns:
        np.ndarray: (H, W, 3) uint8. Numbers that are not 8-bit are rescaled.

    Examples:
        >>> displayable(np.array([[0, 30000, 60000]], np.uint16))[..., 0]
        array([[  0, 127, 255]], dtype=uint8)
    """
    image = image[..., None] if image.ndim == 2 else image
    image = image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, 2)
    if image.dtype != np.uint8:
        image = np.nan_to_num(image.astype(np.float32), posinf=0, neginf=0)
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 255 or high <= 1:
            image = (image - low) * (255 / max(high - low, 1e-12))
        image = image.astype(np.uint8)
    return np.ascontiguousarray(image)

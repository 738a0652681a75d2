"""Images as the test pipeline of a config loads them, and as pictures to draw on."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import tempfile
from pathlib import Path

import cv2
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS
from PIL import Image, UnidentifiedImageError

STOCK = {'mmcv', 'mmpretrain', 'mmpose', 'mmseg'}  # their loading steps take arrays as they are
LABELS = {'LoadAnnotations', 'LoadDepthAnnotation'}  # steps that images without labels do without
WANTED = dict(
    colour='(height, width, 3) uint8 in the order blue, green, red, as cv2.imread returns it',
    grey='(height, width) uint8, as cv2.imread(FILE, cv2.IMREAD_GRAYSCALE) returns it',
    any='(height, width) or (height, width, channels) numbers, as cv2.imread(FILE, '
    'cv2.IMREAD_UNCHANGED) returns them',
)


def reason(err: BaseException) -> str:
    """What an error says, its kind if it says nothing."""
    return str(err) or type(err).__name__


def is_image(path: Path) -> bool:
    """Whether OpenCV or Pillow take a file for an image by its content; it may be damaged."""
    try:
        if cv2.haveImageReader(str(path)):
            return True
        with Image.open(path):
            return True
    except Image.DecompressionBombError:
        return True
    except (cv2.error, OSError, SyntaxError, ValueError):
        return False


def check_file(file: Path | bytes) -> None:
    """Refuse a file that is no image, or not a whole one, whatever it is to be read with.

    Args:
        file (Path | bytes): The file, or what is in one.

    Raises:
        ValueError: The message is the end of a sentence about the file.
    """
    if isinstance(file, Path) and not file.is_file():
        raise ValueError('it is a folder' if file.is_dir() else 'there is no such file')
    if not (len(file) if isinstance(file, bytes) else file.stat().st_size):
        raise ValueError('it is empty')
    try:
        # OpenCV fills what is missing of a file that was cut off with grey; Pillow tells.
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image.load()
    except UnidentifiedImageError as err:
        if not _known_to_opencv(file):
            raise ValueError('it is no image') from err
    except Image.DecompressionBombError as err:
        raise ValueError(
            f'it is too large ({err}): raise PIL.Image.MAX_IMAGE_PIXELS if you trust it'
        ) from err
    except PermissionError as err:
        raise ValueError(f'it cannot be read ({err.strerror})') from err
    except Exception as err:  # Pillow's readers raise what their formats let happen
        raise ValueError(f'it is damaged ({reason(err)})') from err


def _known_to_opencv(file: Path | bytes) -> bool:
    if isinstance(file, bytes):
        return cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED) is not None
    return cv2.haveImageReader(str(file))


class Loader:
    """The first step of a test pipeline, by which images become arrays.

    Args:
        step (LoadImageFromFile, optional): The step. Defaults to None: colour, by OpenCV.

    Raises:
        ValueError: If it needs a package that is not installed.

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
        if flag == cv2.IMREAD_GRAYSCALE or str(flag).startswith('grayscale'):
            self.kind = 'grey'
        else:
            self.kind = 'colour' if flag == cv2.IMREAD_COLOR or 'color' in str(flag) else 'any'
        if backend == 'tifffile':  # which knows no flags
            self.kind = 'any'

    def read(self, file: Path | bytes) -> np.ndarray:
        """Read an image.

        Args:
            file (Path | bytes): The file, or what is in one.

        Returns:
            np.ndarray: What the step makes of it, such as (H, W, 3) uint8 in BGR.

        Raises:
            ValueError: If the step cannot read it.
        """
        if isinstance(file, bytes):
            with tempfile.TemporaryDirectory(prefix='mmhrformer-') as folder:
                path = Path(folder, 'image')
                path.write_bytes(file)
                return self.read(path)
        try:
            results = self.step(dict(img_path=os.fspath(file)))
            return results['img']  # None for what ignore_empty lets pass
        except Exception as err:  # whatever a file or the place of it lets happen
            said = '' if isinstance(err, AssertionError) else f' ({reason(err)})'
            raise ValueError(f'{self.step} cannot read it{said}: convert it, to PNG') from err

    def take(self, pixels: np.ndarray) -> np.ndarray:
        """Check an array that stands for an image.

        Args:
            pixels (np.ndarray): What the step would give of a file.

        Returns:
            np.ndarray: The same, in the type and shape in which the step gives it.

        Raises:
            ValueError: If the step gives no such array of any file.
        """
        if self._gives(pixels):
            pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
            return pixels.astype(np.float32) if self.step.to_float32 else pixels
        if not self._is_stock():
            raise ValueError(
                f'inputs: an array; the test pipeline loads files by {self.step}, and what that '
                'makes of arrays is not known. Give the paths of the images'
            )
        usual = self.kind == 'colour' and not self.step.to_float32
        because = '' if usual else f'; the test pipeline loads by {self.step}'
        raise ValueError(
            f'inputs: an array of shape {pixels.shape} and type {pixels.dtype}; give '
            f'{WANTED[self.kind]}{because}'
        )

    def frame(self, pixels: np.ndarray) -> np.ndarray:
        """Bring a frame of a video into the form that the step gives.

        Args:
            pixels (np.ndarray): (H, W, 3) uint8, BGR.

        Returns:
            np.ndarray: The frame, (H, W) if the step loads grey images.
        """
        if self.kind == 'grey':
            pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
        return self.take(pixels)

    def _is_stock(self) -> bool:
        return type(self.step).__module__.split('.')[0] in STOCK

    def _gives(self, pixels: np.ndarray) -> bool:
        if not self._is_stock() or not pixels.size or pixels.ndim not in (2, 3):
            return False
        if self.kind == 'any':
            return pixels.dtype.kind in 'uif'
        channels = pixels.shape[2] if pixels.ndim == 3 else 1
        if channels != (3 if self.kind == 'colour' else 1):
            return False
        if pixels.dtype == np.uint8:
            return True
        # Numbers of 8 bits that are float32 already, as the step makes them.
        whole = (pixels >= 0) & (pixels <= 255) & (pixels == np.rint(pixels))
        return bool(self.step.to_float32 and whole.all())


def split_pipeline(pipeline: list[dict]) -> tuple[Loader, Compose]:
    """Build a test pipeline in two parts: how images are loaded, and what is done with them.

    Args:
        pipeline (list[dict]): Its config. Names are looked up in the scope that is set.

    Returns:
        tuple[Loader, Compose]: Both; steps that load labels are left out.

    Raises:
        ValueError: If images are loaded by something else than a ``LoadImageFromFile``.
    """
    steps = [TRANSFORMS.build(step) for step in pipeline if _name(step) not in LABELS]
    if steps and isinstance(steps[0], LoadImageFromFile):
        return Loader(steps[0]), Compose(steps[1:])
    for step in steps:
        if re.search('Load.*Image', type(step).__name__):
            raise ValueError(
                f'model: its test pipeline loads images by {type(step).__name__}; only '
                'LoadImageFromFile and what derives from it, as the first step, are known here. '
                'Use the tools/test.py of the framework'
            )
    return Loader(), Compose(steps)  # the data set holds arrays; the stock inferencers do the same


def _name(step: dict) -> str:
    kind = step['type']
    return kind.split('.')[-1] if isinstance(kind, str) else kind.__name__


def displayable(image: np.ndarray) -> np.ndarray:
    """Bring an array of any depth and number of channels into a form to draw on.

    Args:
        image (np.ndarray): (H, W) or (H, W, C); of three channels or more the first three are
            taken for blue, green and red, of fewer the first for grey.

    Returns:
        np.ndarray: (H, W, 3) uint8. Numbers other than those of 8 bits are stretched.

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

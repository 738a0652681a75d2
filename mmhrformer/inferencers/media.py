"""Inputs of inferencers: images, folders, videos, and URLs of images and videos."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = (
    '.3gp', '.avi', '.flv', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv',
)  # fmt: skip
CAMERA = re.compile(r'webcam(?::(\d+))?')
STREAM = re.compile('(rtsps?|rtmps?|rtp|udp|tcp|mms|srt)://', re.IGNORECASE)
MAX_STEM = 200  # bytes; file systems allow 255, and files are first written by longer names
TIMEOUT = 30  # seconds without a response of a server
FALLBACK_FPS = 25.0  # for videos without a frame rate


@dataclass(frozen=True, eq=False)
class Picture:
    """An image that is not loaded yet.

    Attributes:
        name (str): Name in messages and predictions.
        stem (str): Beginning of the names of output files.
        source (Path | str | np.ndarray): A file, a URL, or an array.
        is_frame (bool): Whether the array is a frame of a video: BGR, uint8. Other arrays are
            like the output of the test pipeline's loading step. Defaults to False.
    """

    name: str
    stem: str
    source: Path | str | np.ndarray
    is_frame: bool = False


class Video:
    """A video, read frame by frame.

    Args:
        path (str | Path): The file, the URL of a stream such as ``'rtsp://...'``, or
            ``'webcam'`` or ``'webcam:1'`` for a camera; both are read until they end.
        name (str, optional): Name in messages and predictions. Defaults to None: the path.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If no frame can be read.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path, self.name = str(path), name or str(path)
        camera = None if Path(path).exists() else CAMERA.fullmatch(self.path)
        if camera:
            self.path = int(camera[1] or 0)
        elif not STREAM.match(self.path) and not Path(path).is_file():
            raise FileNotFoundError(
                f'inputs={self.name!r}: no such file (in {Path.cwd()}). Check the path'
            )
        self.stem = stem_of(self.name) or 'video'
        # Not mmcv.VideoReader, which does not support streams and seeks by frame numbers.
        reader = cv2.VideoCapture(self.path)
        fps, count = reader.get(cv2.CAP_PROP_FPS), reader.get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps = fps if fps > 0 else FALLBACK_FPS
        self._length = max(int(count), 1)  # unknown for streams and some files
        if not reader.read()[0]:
            hint = 'camera. Check its number, and that no other program is using it'
            if not camera:
                hint = (
                    'video. Play it to check whether it is complete, or convert it: ffmpeg -i FILE '
                    '-pix_fmt yuv420p NEW.mp4'
                )
            raise ValueError(f'inputs={self.name!r}: cannot read from the {hint}')

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Picture]:
        reader = cv2.VideoCapture(self.path)
        number = 0
        while (frame := reader.read())[0]:
            name, stem = f'{self.name}, frame {number}', f'{self.stem}_{number:06d}'
            yield Picture(name, stem, frame[1], is_frame=True)
            number += 1
        if number < 0.9 * self._length:  # headers are not exact
            warnings.warn(
                f'{self.name}: only {number} of {self._length} frames could be read; play it to '
                'check whether it is complete',
                stacklevel=2,
            )


Media = list[Picture] | Video


def open_media(inputs: object) -> Media:
    """Find the images or the video in the inputs, and check them without decoding whole images.

    Args:
        inputs (str | Path | np.ndarray | Sequence): An image: a path, a URL, or an array like the
            output of the test pipeline's loading step, usually (H, W, 3) uint8 in BGR; a list of
            these; a folder, whose images are sorted by name; a video: a path, a URL, a stream
            (``'rtsp://...'``) or a camera (``'webcam'``, ``'webcam:1'``).

    Returns:
        list[Picture] | Video: An iterable of :class:`Picture`.

    Raises:
        FileNotFoundError: If there is no such file, or no image in the folder.
        TypeError: If the inputs are of an unsupported type.
        ValueError: If they cannot be read.

    Examples:
        >>> open_media([np.zeros((32, 48, 3), np.uint8)])[0].name
        'array 0'
    """
    if isinstance(inputs, Video):
        return inputs
    if isinstance(inputs, (list, tuple)):
        return _pictures(inputs)
    if is_url(inputs):
        return _open_url(inputs)
    if isinstance(inputs, (str, Path)):
        path = Path(inputs)
        if path.is_dir():
            return _pictures(_images_in(path))
        is_camera = CAMERA.fullmatch(str(inputs)) and not path.exists()
        if is_camera or STREAM.match(str(inputs)) or _is_video(path):
            return Video(inputs)
    return _pictures([inputs])


def _pictures(sources: Sequence) -> list[Picture]:
    """Check paths, URLs, arrays and pictures, and convert all of them to pictures."""
    if not sources:
        raise ValueError('inputs=[]: the list is empty; pass at least one image')
    paths = [source for source in sources if isinstance(source, (str, Path))]
    if videos := [path for path in paths if _has_video_name(path)]:
        raise ValueError(f'inputs: {str(videos[0])!r} is a video; pass each video separately')
    # One unreadable file must not stop the others.
    there = os.path.lexists if len(sources) > 1 else os.path.isfile
    if missing := [str(path) for path in paths if not is_url(path) and not there(path)]:
        names = ', '.join(missing[:10]) + ', ...' * (len(missing) > 10)
        raise FileNotFoundError(f'inputs: no such file (in {Path.cwd()}): {names}. Check the path')
    pictures = [_picture(source, i) for i, source in enumerate(sources)]
    if len(pictures) == 1:
        _check_single(pictures[0])
    return pictures


def _picture(source: object, number: int) -> Picture:
    if isinstance(source, Picture):
        return source
    if isinstance(source, np.ndarray):
        return Picture(f'array {number}', f'{number:06d}', source)
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f'inputs: got {type(source).__name__}; expected a path, a URL (http, https), an array, '
            'a list of these, a folder or a video'
        )
    stem = stem_of(source) or f'{number:06d}'
    return Picture(str(source), stem, source if is_url(source) else Path(source))


def _check_single(picture: Picture) -> None:
    """Refuse a file that is not an image early, before a model is built."""
    if isinstance(picture.source, Path):
        try:
            check_file(picture.source, decode=False)
        except ValueError as err:
            raise ValueError(f'inputs={picture.name!r}: {err}. Pass an image or a video') from err


def _images_in(folder: Path) -> list[Path]:
    """The files of a folder that are images, by name or content."""
    files = sorted(path for path in folder.iterdir() if not path.is_dir())
    paths = [
        path
        for path in files
        if path.suffix.lower() in IMAGE_SUFFIXES or (path.is_file() and is_image(path))
    ]
    if not paths:
        raise FileNotFoundError(
            f'inputs={str(folder)!r}: no image in that folder ({", ".join(IMAGE_SUFFIXES)}, or '
            'other files with the content of one); subfolders are not searched. Pass the folder '
            'that contains the images'
        )
    videos = [path.name for path in files if path not in set(paths) and _has_video_name(path)]
    if videos:
        warnings.warn(
            f'{folder}: only the images are read; pass each video separately: '
            + ', '.join(videos[:10]),
            stacklevel=2,
        )
    return paths


def _open_url(url: str) -> Media:
    """Download an image or a video, as determined by its content."""
    folder = tempfile.mkdtemp(prefix='mmhrformer-')
    try:
        path = download(url, folder)
        if _is_video(path):
            media = owner = Video(path, url)
        else:
            owner = Picture(url, stem_of(url) or 'image', path)
            _check_single(owner)
            media = [owner]
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return media


@contextmanager
def local_file(source: str | Path) -> Iterator[Path]:
    """Provide a local file; a downloaded one is deleted afterwards."""
    if not is_url(source):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix='mmhrformer-') as folder:
        yield download(source, folder)


def download(url: str, folder: str) -> Path:
    """Download a file to a folder; refuse web pages."""
    # mmengine's HTTPBackend has no timeout, and a user agent that some servers refuse.
    request = Request(url, headers={'User-Agent': 'mmhrformer'})
    try:
        with urlopen(request, timeout=TIMEOUT) as answer:
            kind, content = answer.headers.get_content_type(), answer.read()
    except (OSError, ValueError) as err:
        raise ValueError(
            f'inputs={url!r}: cannot be downloaded ({str(err).strip("<>")}). Check the URL and '
            'the network, or pass a local file'
        ) from err
    if kind == 'text/html':
        raise ValueError(f'inputs={url!r} is a web page. Pass the URL of the image or video itself')
    path = Path(folder, f'file{PurePosixPath(urlsplit(url).path).suffix}')
    path.write_bytes(content)
    return path


def is_url(text: object) -> bool:
    """Whether something is an http(s) URL."""
    return isinstance(text, str) and text.lower().startswith(('http://', 'https://'))


def stem_of(source: str | Path) -> str:
    """File name of a path or URL, without its suffix, and cut to leave room for another one."""
    path = unquote(urlsplit(source).path) if is_url(source) else str(source)
    stem = os.fsencode(Path(Path(path).name).stem)
    return os.fsdecode(stem) if len(stem) <= MAX_STEM else stem[:MAX_STEM].decode(errors='ignore')


def _has_video_name(path: str | Path) -> bool:
    """Whether a file has the extension of a video, and is not a misnamed image."""
    name = urlsplit(path).path if is_url(path) else path
    if PurePosixPath(name).suffix.lower() not in VIDEO_SUFFIXES:
        return False
    return not (os.path.isfile(path) and is_image(Path(path)))


def _is_video(path: Path) -> bool:
    """Whether a file is a video, by its name or because OpenCV can read frames from it."""
    if _has_video_name(path):
        return True
    if not path.is_file():
        return False
    with path.open('rb') as file:
        head = file.read(4096)
    # FFmpeg renders text files as video, but real videos contain zero bytes.
    if not head.startswith((b'GIF87a', b'GIF89a')) and (b'\0' not in head or is_image(path)):
        return False
    return cv2.VideoCapture(str(path)).read()[0]


def is_image(path: Path) -> bool:
    """Whether OpenCV or Pillow recognizes a file as an image, which may be damaged."""
    try:
        if cv2.haveImageReader(str(path)):
            return True
        with Image.open(path):
            return True
    except Image.DecompressionBombError:
        return True
    except (cv2.error, OSError, SyntaxError, ValueError):
        return False


def check_file(file: Path, decode: bool = True) -> None:
    """Refuse a file that is not an image or, with ``decode``, is incomplete.

    OpenCV silently fills the missing part of a truncated file with gray; Pillow raises an error.
    """
    if not file.is_file():
        raise ValueError('it is a folder' if file.is_dir() else 'there is no such file')
    if not file.stat().st_size:
        raise ValueError('it is empty')
    try:
        with Image.open(file) as image:
            if decode:
                image.load()
    except UnidentifiedImageError as err:
        # Not haveImageReader, which accepts any GIF by its first bytes.
        if cv2.imread(str(file), cv2.IMREAD_UNCHANGED) is None:
            raise ValueError('it is not an image') from err
    except Image.DecompressionBombError as err:
        raise ValueError(
            f'it is too large ({err}): raise PIL.Image.MAX_IMAGE_PIXELS if you trust it'
        ) from err
    except PermissionError as err:
        raise ValueError(f'it cannot be read ({err.strerror})') from err
    except Exception as err:  # Pillow's readers raise all kinds of errors
        raise ValueError(f'it is damaged ({reason(err)})') from err


def reason(err: BaseException) -> str:
    """The message of an error, or its type if it has none; both if it names only a key."""
    if isinstance(err, KeyError):
        return f'{type(err).__name__}: {err}'
    return str(err) or type(err).__name__

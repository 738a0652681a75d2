"""What inferencers read and write: images, folders, videos and addresses; pictures and labels."""

from __future__ import annotations

import io
import json
import mimetypes
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import cv2
import mmcv
import numpy as np
from PIL import Image, UnidentifiedImageError

from .files import write_atomically

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv')
TIMEOUT = 30  # seconds that a server may be silent
FALLBACK_FPS = 25.0  # for a video that does not tell
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Picture:
    """An image to look at, or why there is none.

    Attributes:
        name (str): What it is called in messages and predictions.
        stem (str): Beginning of the names of files that are written about it.
        pixels (np.ndarray, optional): (H, W, 3) uint8, BGR.
        error (str): Why it could not be read, else empty.
    """

    name: str
    stem: str
    pixels: np.ndarray | None
    error: str = ''


def is_url(text: object) -> bool:
    """Whether something is an address on the web."""
    return isinstance(text, str) and text.lower().startswith(('http://', 'https://'))


def download(url: str) -> tuple[bytes, str]:
    """Get a file from the web.

    Args:
        url (str): Its address.

    Returns:
        tuple[bytes, str]: Its content, and its suffix such as ``'.jpg'``: from the address or, if
        that has none, from what the server says.

    Raises:
        ValueError: If there is no such file, the server does not answer, or it sends a web page.
    """
    try:
        with urlopen(Request(url, headers={'User-Agent': 'mmhrformer'}), timeout=TIMEOUT) as answer:
            kind, content = answer.headers.get_content_type(), answer.read()
    except (OSError, ValueError) as err:
        raise ValueError(
            f'inputs={url!r}: cannot be downloaded ({str(err).strip("<>")}). Check the address and '
            'the network, or give a file of this machine'
        ) from err
    if kind == 'text/html':
        raise ValueError(
            f'inputs={url!r}: is a web page. Give the address of the image or video itself'
        )
    suffix = PurePosixPath(urlsplit(url).path).suffix.lower()
    if suffix not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        suffix = mimetypes.guess_extension(kind) or ''
    return content, suffix


def decode(content: bytes) -> np.ndarray:
    """Decode an image as the loading transforms of the frameworks do.

    Args:
        content (bytes): What is in the file.

    Returns:
        np.ndarray: (H, W, 3) uint8, BGR.

    Raises:
        ValueError: If it is no image, or a damaged one.
    """
    try:
        # OpenCV fills what is missing of a file that was cut off with grey; Pillow tells.
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except UnidentifiedImageError:
        pass  # a format that only OpenCV knows, or none
    except (OSError, SyntaxError, ValueError) as err:
        raise ValueError(f'it is damaged ({err})') from err
    pixels = mmcv.imfrombytes(content, flag='color') if content else None
    if pixels is None:
        raise ValueError('it is no image' if content else 'it is empty')
    return pixels


def check_array(pixels: np.ndarray) -> np.ndarray:
    """Return an array that is an image; raise a ValueError for any other."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(
            f'inputs: an array of shape {pixels.shape} and type {pixels.dtype}; give '
            '(height, width, 3) uint8 in the order blue, green, red, as cv2.imread returns it'
        )
    return pixels


class Images:
    """One or several images, read one by one when it is their turn.

    An image that cannot be read is an error if it is alone. Among others it must not spoil the
    work: it comes as a :class:`Picture` with the error, and a warning names it.

    Args:
        sources (Sequence): Paths, addresses, arrays, and pictures that are read already.

    Raises:
        FileNotFoundError: If files do not exist; all of them are named.
        TypeError: If a source is none of these.
        ValueError: If an array is no image, or the only image cannot be read.
    """

    def __init__(self, sources: Sequence[str | Path | np.ndarray | Picture]) -> None:
        self.sources = list(sources)
        self._check()
        self.stems = unique([self._stem(i) for i in range(len(self))])
        self._only = self._read(0) if len(self) == 1 else None
        if self._only and self._only.error:
            raise ValueError(
                f'inputs={self._only.name!r}: {self._only.error}. Give an image or a video'
            )

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> Iterator[Picture]:
        if self._only:
            yield self._only
            return
        failed = 0
        for i in range(len(self)):
            picture = self._read(i)
            if picture.error:
                failed += 1
                warnings.warn(f'{picture.name}: {picture.error}; left out', stacklevel=2)
            yield picture
        if failed == len(self):
            raise ValueError(
                f'inputs: none of the {failed} images could be read, from {self._name(0)!r} on. '
                'Check the files'
            )

    def _check(self) -> None:
        for source in self.sources:
            if isinstance(source, np.ndarray):
                check_array(source)
            elif not isinstance(source, (str, Path, Picture)):
                raise TypeError(
                    f'inputs: got {type(source).__name__}; give a path, an address (http, https), '
                    'an array, a list of these, a folder or a video'
                )
        paths = [s for s in self.sources if isinstance(s, (str, Path)) and not is_url(s)]
        missing = [str(path) for path in paths if not Path(path).is_file()]
        if missing:
            raise FileNotFoundError(
                f'inputs: no such file (from {Path.cwd()}): {", ".join(missing[:10])}'
                + (f' and {len(missing) - 10} more' if len(missing) > 10 else '')
                + '. Check the path'
            )

    def _name(self, i: int) -> str:
        source = self.sources[i]
        if isinstance(source, Picture):
            return source.name
        return f'array {i}' if isinstance(source, np.ndarray) else str(source)

    def _stem(self, i: int) -> str:
        source = self.sources[i]
        if isinstance(source, (np.ndarray, Picture)):
            return f'{i:06d}' if isinstance(source, np.ndarray) else source.stem
        return stem_of(source) or f'{i:06d}'

    def _read(self, i: int) -> Picture:
        source, name = self.sources[i], self._name(i)
        if isinstance(source, Picture):
            return source
        if isinstance(source, np.ndarray):
            return Picture(name, self.stems[i], source)
        try:
            content = download(source)[0] if is_url(source) else Path(source).read_bytes()
            return Picture(name, self.stems[i], decode(content))
        except (OSError, ValueError) as err:
            return Picture(name, self.stems[i], None, str(err))


class Video:
    """A video, read frame by frame.

    Args:
        path (str | Path): The file.
        name (str, optional): What it is called in messages and predictions.
            Defaults to None: the path.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If no frame of it can be read.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path, self.name = Path(path), name or str(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f'inputs={self.name!r}: no such file (from {Path.cwd()}). Check the path'
            )
        self.stem = stem_of(self.name) or 'video'
        reader = mmcv.VideoReader(str(self.path))
        self.fps = reader.fps if reader.fps and reader.fps > 0 else FALLBACK_FPS
        self._length = max(int(reader.frame_cnt), 1)  # some files tell nothing
        if reader.read() is None:
            raise ValueError(
                f'inputs={self.name!r}: no frame of the video can be read. Play it to see whether '
                'it is whole, or convert it: ffmpeg -i FILE -pix_fmt yuv420p NEW.mp4'
            )

    @classmethod
    def from_bytes(cls, content: bytes, suffix: str, name: str) -> Video:
        """A video from the web: OpenCV wants a file, which goes when the video goes."""
        folder = Path(tempfile.mkdtemp(prefix='mmhrformer-'))
        path = folder / f'video{suffix}'
        try:
            path.write_bytes(content)
            video = cls(path, name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(video, shutil.rmtree, folder, ignore_errors=True)
        return video

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Picture]:
        reader = mmcv.VideoReader(str(self.path))
        number = 0
        while (pixels := reader.read()) is not None:
            yield Picture(f'{self.name}, frame {number}', f'{self.stem}_{number:06d}', pixels)
            number += 1


def stem_of(source: str | Path) -> str:
    """Name of a file without folder and suffix, of a path or an address.

    Examples:
        >>> stem_of('https://example.org/people%20at%20home.jpg?size=big')
        'people at home'
    """
    path = unquote(urlsplit(source).path) if is_url(source) else str(source)
    return Path(Path(path).name).stem


def unique(stems: list[str]) -> list[str]:
    """Add numbers to names that occur more than once.

    Examples:
        >>> unique(['a', 'b', 'a'])
        ['a', 'b', 'a_1']
    """
    taken: set[str] = set()
    names = []
    for stem in stems:
        name, number = stem, 0
        while name in taken:
            number += 1
            name = f'{stem}_{number}'
        taken.add(name)
        names.append(name)
    return names


def open_media(inputs: object) -> Images | Video:
    """Find out what was given to look at, and check what can be checked in no time.

    Args:
        inputs (str | Path | np.ndarray | Sequence): An image: path, address or array (H, W, 3)
            uint8 in BGR; a list of these; a folder, whose images are taken in order of their names;
            a video: path or address.

    Returns:
        Images | Video: What gives a :class:`Picture` after the other.

    Raises:
        FileNotFoundError: If there is no such file, or no image in the folder.
        TypeError: If it is none of these.
        ValueError: If it cannot be read.

    Examples:
        >>> media = open_media([np.zeros((32, 48, 3), np.uint8)])
        >>> [(picture.name, picture.pixels.shape) for picture in media]
        [('array 0', (32, 48, 3))]
    """
    if isinstance(inputs, (Images, Video)):
        return inputs
    if isinstance(inputs, (list, tuple)):
        if not inputs:
            raise ValueError('inputs=[]: the list is empty; give at least one image')
        videos = [s for s in inputs if isinstance(s, (str, Path)) and _is_video(s)]
        if videos:
            raise ValueError(f'inputs: {str(videos[0])!r} is a video; give a video by itself')
        return Images(inputs)
    if is_url(inputs):
        content, suffix = download(inputs)
        if suffix in VIDEO_SUFFIXES:
            return Video.from_bytes(content, suffix, inputs)
        try:
            return Images([Picture(inputs, stem_of(inputs) or 'image', decode(content))])
        except ValueError as err:
            raise ValueError(f'inputs={inputs!r}: {err}. Give an image or a video') from err
    if isinstance(inputs, (str, Path)) and Path(inputs).is_dir():
        return Images(_images_in(Path(inputs)))
    if isinstance(inputs, (str, Path)) and _is_video(inputs):
        return Video(inputs)
    return Images([inputs])


def _is_video(path: str | Path) -> bool:
    name = urlsplit(path).path if is_url(path) else str(path)
    return Path(name).suffix.lower() in VIDEO_SUFFIXES


def _images_in(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(
            f'inputs={str(folder)!r}: no image in that folder ({", ".join(IMAGE_SUFFIXES)}); '
            'folders inside it are not searched. Give the folder with the images'
        )
    return paths


class Writer:
    """Writes what was found, image by image, so that nothing is lost if the work stops.

    ``visualizations/STEM.jpg`` (``.mp4`` for a video) and ``predictions/STEM.json``; labels of
    pixels go to ``predictions/STEM.png`` (``STEM_NUMBER.png`` for a video).

    Args:
        folder (str | Path, optional): Where to. Defaults to None: nothing is written.
        media (Images | Video): What is looked at.

    Attributes:
        files (list[str]): What was written.

    Raises:
        ValueError: If the folder cannot be made.
    """

    def __init__(self, folder: str | Path | None, media: Images | Video) -> None:
        self.files: list[str] = []
        self.folder = None if folder is None else Path(folder)
        self._video = media if isinstance(media, Video) else None
        self._frames: list[dict] = []
        self._encoder = None
        if self.folder is None:
            return
        try:
            for part in ('visualizations', 'predictions'):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise ValueError(f'out_dir={str(folder)!r}: {err}. Give a folder to write to') from err

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._encoder is not None:
            self._encoder.release()
        if self.folder is not None and self._video:
            self._write_json(self._video.stem, self._frames)

    def add(
        self,
        picture: Picture,
        prediction: dict,
        drawn: np.ndarray | None = None,
        labels: np.ndarray | None = None,
    ) -> None:
        """Write what was found in an image.

        Args:
            picture (Picture): The image.
            prediction (dict): What goes into the JSON file.
            drawn (np.ndarray, optional): The picture with what was found drawn on it, RGB.
            labels (np.ndarray, optional): The label of each pixel, (H, W) uint8.
        """
        if self.folder is None:
            return
        if drawn is not None:
            self._write_picture(picture, np.ascontiguousarray(drawn[..., ::-1]))
        if labels is not None:
            self._write_image(self.folder / 'predictions' / f'{picture.stem}.png', labels)
        if self._video:
            self._frames.append(prediction)
        else:
            self._write_json(picture.stem, prediction)

    def _write_picture(self, picture: Picture, pixels: np.ndarray) -> None:
        folder = self.folder / 'visualizations'
        if self._video is None:
            self._write_image(folder / f'{picture.stem}.jpg', pixels)
            return
        if self._encoder is None:
            path, size = folder / f'{self._video.stem}.mp4', pixels.shape[1::-1]
            code = cv2.VideoWriter_fourcc(*'mp4v')
            self._encoder = cv2.VideoWriter(str(path), code, self._video.fps, size)
            if not self._encoder.isOpened():
                raise ValueError(
                    f'out_dir: OpenCV cannot write {path}. Check that the disk has space; an '
                    'OpenCV with FFmpeg is needed: pip install opencv-python'
                )
            self.files.append(str(path))
        self._encoder.write(pixels)

    def _write_image(self, path: Path, pixels: np.ndarray) -> None:
        _, content = cv2.imencode(path.suffix, pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        self._write(path, content.tobytes())

    def _write_json(self, stem: str, content: dict | list) -> None:
        text = json.dumps(content) + '\n'
        self._write(self.folder / 'predictions' / f'{stem}.json', text.encode())

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_atomically(path, content)
        except OSError as err:
            raise ValueError(
                f'out_dir: cannot write {path} ({err.strerror}). Check that the disk has space'
            ) from err
        self.files.append(str(path))

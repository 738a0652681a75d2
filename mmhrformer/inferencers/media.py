"""What inferencers read and write: images, folders, videos and addresses; pictures and labels."""

from __future__ import annotations

import json
import mimetypes
import os
import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import cv2
import numpy as np

from ..utils.files import write_atomically
from .image_loading import Loader, check_file, is_image, reason

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv')
TIMEOUT = 30  # seconds that a server may be silent
FALLBACK_FPS = 25.0  # for a video that does not tell
JPEG_QUALITY = 95
STREAM = re.compile('(rtsps?|rtmps?|rtp|udp|tcp|mms|srt)://', re.IGNORECASE)
PLAIN = Loader()


@dataclass(frozen=True)
class Picture:
    """An image to look at, or why there is none.

    Attributes:
        name (str): What it is called in messages and predictions.
        stem (str): Beginning of the names of files that are written about it.
        pixels (np.ndarray, optional): The image as ``loader`` gives it; (H, W, 3) uint8, BGR,
            unless the loader is another one.
        error (str): Why it could not be read, else empty.
        file (Path | bytes, optional): The file that it is from, or what is in that.
        loader (Loader, optional): What has made the pixels.
    """

    name: str
    stem: str
    pixels: np.ndarray | None
    error: str = ''
    file: Path | bytes | None = field(default=None, repr=False)
    loader: Loader | None = field(default=None, repr=False)

    def loaded_by(self, loader: Loader) -> Picture:
        """The same picture, with the pixels that a loader gives.

        Args:
            loader (Loader): The loader.

        Returns:
            Picture: With an error if the loader cannot read the file.

        Raises:
            ValueError: If it is an array that the loader gives of no file.
        """
        if self.error or self.loader is loader:
            return self
        if self.file is None:
            return replace(self, pixels=loader.take(self.pixels), loader=loader)
        try:
            return replace(self, pixels=loader.read(self.file), loader=loader)
        except ValueError as err:
            return replace(self, pixels=None, error=str(err))


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


class Images:
    """One or several images, read one by one when it is their turn.

    An image that cannot be read is an error if it is alone. Among others it must not spoil the
    work: it comes as a :class:`Picture` with the error.

    Args:
        sources (Sequence): Paths, addresses, arrays, and pictures.

    Raises:
        FileNotFoundError: If files do not exist; all of them are named.
        TypeError: If a source is none of these.
        ValueError: If the only image is no image, or a damaged one.
    """

    def __init__(self, sources: Sequence[str | Path | np.ndarray | Picture]) -> None:
        self.sources = list(sources)
        self._check()
        self.stems = unique([self._stem(i) for i in range(len(self))])
        self._only = self._open(0) if len(self) == 1 else None
        if self._only and self._only.error:
            raise ValueError(
                f'inputs={self._only.name!r}: {self._only.error}. Give an image or a video'
            )

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> Iterator[Picture]:
        return self.pictures(PLAIN)

    def pictures(self, loader: Loader) -> Iterator[Picture]:
        """Read the images.

        Args:
            loader (Loader): How.

        Returns:
            Iterator[Picture]: The images, or what is wrong with them.

        Raises:
            ValueError: If an array is not what the loader gives.
        """
        for source in self.sources:
            if isinstance(source, np.ndarray):
                loader.take(source)
        return self._pictures(loader)

    def _pictures(self, loader: Loader) -> Iterator[Picture]:
        for i in range(len(self)):
            yield (self._only or self._open(i)).loaded_by(loader)

    def _check(self) -> None:
        for source in self.sources:
            if not isinstance(source, (str, Path, Picture, np.ndarray)):
                raise TypeError(
                    f'inputs: got {type(source).__name__}; give a path, an address (http, https), '
                    'an array, a list of these, a folder or a video'
                )
        paths = [s for s in self.sources if isinstance(s, (str, Path)) and not is_url(s)]
        # Among others, what is there and cannot be read must not spoil the work.
        there = os.path.lexists if len(self) > 1 else os.path.isfile
        missing = [str(path) for path in paths if not there(path)]
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

    def _open(self, i: int) -> Picture:
        """Find out whether it is an image; it is not decoded yet."""
        source, name = self.sources[i], self._name(i)
        if isinstance(source, np.ndarray):
            return Picture(name, self.stems[i], source)
        picture = source if isinstance(source, Picture) else Picture(name, self.stems[i], None)
        try:
            if not isinstance(source, Picture):
                file = download(source)[0] if is_url(source) else Path(source)
                picture = replace(picture, file=file)
            if picture.pixels is None and picture.file is not None:
                check_file(picture.file)
            return picture
        except Exception as err:  # whatever a single file lets happen
            return replace(picture, error=reason(err))


class Video:
    """A video, read frame by frame.

    Args:
        path (str | Path): The file, or the address of a stream such as ``'rtsp://...'``.
        name (str, optional): What it is called in messages and predictions.
            Defaults to None: the path.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If no frame of it can be read.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path, self.name = str(path), name or str(path)
        if not STREAM.match(self.path) and not Path(path).is_file():
            raise FileNotFoundError(
                f'inputs={self.name!r}: no such file (from {Path.cwd()}). Check the path'
            )
        self.stem = stem_of(self.name) or 'video'
        reader = cv2.VideoCapture(self.path)
        fps, count = reader.get(cv2.CAP_PROP_FPS), reader.get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps = fps if fps > 0 else FALLBACK_FPS
        self._length = max(int(count), 1)  # some files and all streams tell nothing
        if not reader.read()[0]:
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
        return self.pictures(PLAIN)

    def pictures(self, loader: Loader) -> Iterator[Picture]:
        """Read the frames.

        Args:
            loader (Loader): How images are read; frames are brought into the same form.

        Yields:
            Picture: A frame.

        Raises:
            ValueError: If the loader knows files only.
        """
        reader = cv2.VideoCapture(self.path)
        number = 0
        while (frame := reader.read())[0]:
            name, stem = f'{self.name}, frame {number}', f'{self.stem}_{number:06d}'
            yield Picture(name, stem, loader.frame(frame[1]), loader=loader)
            number += 1
        if number < 0.9 * self._length:  # what a file tells of its length is not exact
            warnings.warn(
                f'{self.name}: only {number} of {self._length} frames could be read; play it to '
                'see whether it is whole',
                stacklevel=2,
            )


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
        inputs (str | Path | np.ndarray | Sequence): An image: path, address, or array as the
            :class:`Loader` that it is for gives it, usually (H, W, 3) uint8 in BGR; a list of
            these; a folder, whose images are taken in order of their names; a video: path, address
            or stream (``'rtsp://...'``).

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
        videos = [s for s in inputs if isinstance(s, (str, Path)) and _is_called_video(s)]
        if videos:
            raise ValueError(f'inputs: {str(videos[0])!r} is a video; give a video by itself')
        return Images(inputs)
    if is_url(inputs):
        return _from_web(inputs)
    if not isinstance(inputs, (str, Path)):
        return Images([inputs])
    if Path(inputs).is_dir():
        return Images(_images_in(Path(inputs)))
    if re.fullmatch(r'webcam(:\d+)?', str(inputs)) and not Path(inputs).exists():
        raise ValueError(
            f'inputs={inputs!r}: cameras are not read. Record a video and give its path: '
            'ffmpeg -f v4l2 -i /dev/video0 -t 60 NEW.mp4'
        )
    if STREAM.match(str(inputs)) or _is_video(Path(inputs)):
        return Video(inputs)
    return Images([inputs])


def _from_web(url: str) -> Images | Video:
    """What is at an address: an image if it looks like one, whatever its name says."""
    content, suffix = download(url)
    with tempfile.TemporaryDirectory(prefix='mmhrformer-') as folder:
        path = Path(folder, f'file{suffix}')
        path.write_bytes(content)
        video = _is_video(path)
    if video:
        return Video.from_bytes(content, suffix, url)
    return Images([Picture(url, stem_of(url) or 'image', None, file=content)])


def _is_called_video(path: str | Path) -> bool:
    """Whether something has the name of a video, and is no image under a wrong name."""
    name = Path(urlsplit(path).path if is_url(path) else path).name
    kind = mimetypes.guess_type(name)[0] or ''
    called = Path(name).suffix.lower() in VIDEO_SUFFIXES or kind.startswith('video/')
    return called and not (os.path.isfile(path) and is_image(Path(path)))


def _is_video(path: Path) -> bool:
    """Whether a file is a video by its name, or because OpenCV finds frames in it."""
    if _is_called_video(path):
        return True
    if not path.is_file():
        return False
    with path.open('rb') as file:
        head = file.read(4096)
    # FFmpeg takes a text for a film of a terminal; files of videos have zeros.
    if not head.startswith((b'GIF87a', b'GIF89a')) and (b'\0' not in head or is_image(path)):
        return False
    return cv2.VideoCapture(str(path)).read()[0]


def _images_in(folder: Path) -> list[Path]:
    """The files of a folder that have the name of an image, or are one by their content."""
    files = sorted(path for path in folder.iterdir() if not path.is_dir())
    paths = [
        path
        for path in files
        if path.suffix.lower() in IMAGE_SUFFIXES or (path.is_file() and is_image(path))
    ]
    if not paths:
        raise FileNotFoundError(
            f'inputs={str(folder)!r}: no image in that folder ({", ".join(IMAGE_SUFFIXES)}, or '
            'other files with the content of one); folders inside it are not searched. Give the '
            'folder with the images'
        )
    videos = [path.name for path in files if path not in set(paths) and _is_called_video(path)]
    if videos:
        warnings.warn(
            f'{folder}: only the images are looked at; give each video by itself: '
            + ', '.join(videos[:10]),
            stacklevel=2,
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
        options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        good, content = cv2.imencode(path.suffix, pixels, options)
        if not good:  # a JPEG has at most 65,500 pixels on a side
            path, content = path.with_suffix('.png'), cv2.imencode('.png', pixels)[1]
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

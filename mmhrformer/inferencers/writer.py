"""Output of inferencers: drawn pictures, predictions and label maps, as files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..utils.files import write_atomically
from .media import Media, Picture, Video

JPEG_QUALITY = 95


@dataclass(frozen=True)
class Result:
    """The result of an inferencer for an image.

    Attributes:
        picture (Picture): The image.
        prediction (dict): The prediction as plain Python objects, for JSON.
        sample (optional): The data sample of the framework; None after an error.
        drawn (np.ndarray, optional): The image with the prediction drawn on it, (H, W, 3) RGB.
        labels (np.ndarray, optional): The label of each pixel, (H, W) uint8 or uint16.
    """

    picture: Picture
    prediction: dict
    sample: Any = None
    drawn: np.ndarray | None = None
    labels: np.ndarray | None = None


class Writer:
    """Writer of results, one by one, so that finished ones are kept if the run stops.

    Pictures go to ``visualizations/STEM.jpg`` (``.mp4`` for a video), predictions to
    ``predictions/STEM.json``, label maps to ``predictions/STEM.png`` (``STEM_NUMBER.png`` for a
    video). Images with the same stem are numbered.

    Args:
        folder (str | Path, optional): Folder to write to. Defaults to None: nothing is written.
        media (list[Picture] | Video): The inputs.

    Attributes:
        files (list[str]): The written files.

    Raises:
        ValueError: If the folder cannot be created.
    """

    def __init__(self, folder: str | Path | None, media: Media) -> None:
        self.files: list[str] = []
        self.folder = None if folder is None else Path(folder)
        self._video = media if isinstance(media, Video) else None
        self._frames: list[dict] = []
        self._stems: set[str] = set()
        self._encoder = None
        if self.folder is None:
            return
        try:
            for part in ('visualizations', 'predictions'):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise ValueError(f'out_dir={str(folder)!r}: {err}. Choose a writable folder') from err

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._encoder is not None:
            self._encoder.release()
        if self.folder is not None and self._video:
            self._write_json(self._video.stem, self._frames)

    def add(self, result: Result) -> None:
        """Write the result for an image.

        Args:
            result (Result): The result.

        Raises:
            ValueError: If a file cannot be written.
        """
        if self.folder is None:
            return
        stem = self._unused(result.picture.stem)
        if result.drawn is not None:
            pixels = np.ascontiguousarray(result.drawn[..., ::-1])
            if self._video:
                self._write_frame(pixels)
            else:
                self._write_image(self.folder / 'visualizations' / f'{stem}.jpg', pixels)
        if result.labels is not None:
            self._write_image(self.folder / 'predictions' / f'{stem}.png', result.labels)
        if self._video:
            self._frames.append(result.prediction)
        else:
            self._write_json(stem, result.prediction)

    def _unused(self, stem: str) -> str:
        """``stem``, or ``stem_1`` and so on if it is taken."""
        names = (f'{stem}_{number}' if number else stem for number in count())
        unused = next(name for name in names if name not in self._stems)
        self._stems.add(unused)
        return unused

    def _write_frame(self, pixels: np.ndarray) -> None:
        if self._encoder is None:
            path = self.folder / 'visualizations' / f'{self._video.stem}.mp4'
            code, size = cv2.VideoWriter_fourcc(*'mp4v'), pixels.shape[1::-1]
            self._encoder = cv2.VideoWriter(str(path), code, self._video.fps, size)
            if not self._encoder.isOpened():
                raise ValueError(
                    f'out_dir: OpenCV cannot write {path}. Check the free disk space, and that '
                    'OpenCV has FFmpeg: pip install opencv-python'
                )
            self.files.append(str(path))
        self._encoder.write(pixels)

    def _write_image(self, path: Path, pixels: np.ndarray) -> None:
        options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        encoded, content = cv2.imencode(path.suffix, pixels, options)
        if not encoded:  # JPEG allows at most 65,500 pixels on a side
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
                f'out_dir: cannot write {path} ({err.strerror}). Check the free disk space'
            ) from err
        self.files.append(str(path))

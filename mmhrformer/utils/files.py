"""Atomic writes: a file exists completely or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = '.partial'  # suffix of a file that is being written


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file atomically: readers see either the old or the new content, never a part.

    The bytes go to a temporary file next to it, which is flushed to disk and then renamed. Until
    then, both files take up space.

    Args:
        path (str | Path): The file.

    Yields:
        BinaryIO: The temporary file, open for writing.

    Raises:
        OSError: If writing failed, for example on a full disk; the old file is unchanged.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / 'file'
        >>> with whole_file(path) as file:
        ...     _ = file.write(b'content')
        >>> path.read_bytes()
        b'content'
    """
    unfinished = Path(f'{path}.{os.getpid()}{PARTIAL}')  # other processes may write it as well
    try:
        with unfinished.open('wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # free the disk, which may be full
        raise
    _flush_folder(unfinished.parent)


def _flush_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename in it survives a power failure."""
    with contextlib.suppress(OSError):  # not supported by every file system
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write bytes to a file as :func:`whole_file` does.

    Args:
        path (str | Path): The file.
        data (bytes): Its new content.

    Raises:
        OSError: If writing failed; the old file is unchanged.
    """
    with whole_file(path) as file:
        file.write(data)

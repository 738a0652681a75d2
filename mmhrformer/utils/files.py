"""Atomic writes: a file is there completely or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = '.partial'  # ends the name of a file that is being written


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file atomically: its name always stands for a whole file, the old or the new one.

    The bytes go to a second file, are flushed to the disk, and take over the name. For a moment,
    both files take up space.

    Args:
        path (str | Path): The file.

    Yields:
        BinaryIO: The second file, open for writing.

    Raises:
        OSError: If it could not be written, for example on a full disk; the old file is unchanged.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / 'file'
        >>> with whole_file(path) as file:
        ...     _ = file.write(b'content')
        >>> path.read_bytes()
        b'content'
    """
    unfinished = Path(f'{path}.{os.getpid()}{PARTIAL}')  # another process may write it, too
    try:
        with unfinished.open('wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # it may have filled the disk
        raise
    _flush_folder(unfinished.parent)


def _flush_folder(folder: Path) -> None:
    """Flush a folder to the disk: only then is a new name in it safe from a power failure."""
    with contextlib.suppress(OSError):  # some file systems cannot; then the old file comes back
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
        OSError: If it could not be written; the old file is unchanged.
    """
    with whole_file(path) as file:
        file.write(data)

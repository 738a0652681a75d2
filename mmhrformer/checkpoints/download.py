"""Download checkpoints: continued where they broke off, checked before they get their name.

This is urllib and, for the progress bar, rich, which mmengine needs anyway: none of the usual
downloaders continues a partial file and checks a short hash before the file has its final name
without bringing further packages.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from time import sleep
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from mmengine.logging import print_log
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ..version import __version__

try:
    import fcntl
except ImportError:  # Windows: processes must not download the same file at once
    fcntl = None

TRIES = 4
TIMEOUT = 30  # seconds without a byte
LONGEST_WAIT = 60  # seconds between two tries, whatever the server asks for
CHUNK = 1 << 20
PASSING = (429, 500, 502, 503, 504)  # answers that may be another one a moment later
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# The first digits of the SHA-256, as torch.hub and OpenMMLab write them into names: name-HASH.pth
# or, in mmpose, name-HASH_DATE.pth. A date, name-20220316.pth, looks the same but is none.
SHORT_HASH = re.compile(
    r'-(?!20\d\d(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])\.)([0-9a-f]{8,64})(?:_\d{8})?(?:\.\w+)+$'
)


class DownloadError(RuntimeError):
    """A file could not be downloaded. The message says why, and what to do."""


class _PassingError(Exception):
    """A failure that may be over a moment later."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds; None for the usual ones


def cache_folder() -> Path:
    """The folder that downloaded checkpoints are kept in.

    Returns:
        Path: ``$MMHRFORMER_CACHE``, else ``checkpoints/mmhrformer`` in the folder of torch.hub,
        which ``$TORCH_HOME`` moves. It need not exist yet.

    Examples:
        >>> cache_folder().name  # doctest: +SKIP
        'mmhrformer'
    """
    if os.environ.get('MMHRFORMER_CACHE'):
        return Path(os.environ['MMHRFORMER_CACHE']).expanduser()
    from torch.hub import get_dir  # here, as nothing else in this module needs torch

    return Path(get_dir()) / 'checkpoints' / 'mmhrformer'


def short_hash(name: str) -> str:
    """Find the first digits of the SHA-256 in a file's name.

    Args:
        name (str): Name, path or the path of a URL.

    Returns:
        str: Eight digits or more, or an empty string if there are none.

    Examples:
        >>> short_hash('resnet18_8xb32_in1k_20210831-fbbb1da6.pth')
        'fbbb1da6'
        >>> short_hash('hrformer_small_coco_256x192-5310d898_20220316.pth')
        '5310d898'
        >>> short_hash('hrformer-20220316.pth')
        ''
    """
    match = SHORT_HASH.search(name)
    return match[1] if match else ''


def download(url: str, path: Path, sha256: str = '', size: int | None = None) -> Path:
    """Download a file, unless it is there already.

    What has arrived is kept beside the file as ``NAME.part``, and the next try or call continues
    it. The file gets its name only when it is complete and checked: by ``sha256``, else by the
    short hash in its name or in that of the URL, else not, which is said. Of several processes
    one downloads and the others wait for it (``NAME.lock``, which stays).

    Args:
        url (str): Where the file is; http or https.
        path (Path): What the file shall be called here. Its folder is made if need be.
        sha256 (str): Its SHA-256, 64 hexadecimal digits. Defaults to ``''``, unknown.
        size (int, optional): Its size in bytes. Defaults to None, unknown.

    Returns:
        Path: ``path``.

    Raises:
        DownloadError: If the file cannot be had, or is there and is not the expected one.
        ValueError: If ``sha256`` cannot be a SHA-256.

    Examples:
        >>> name = 'resnet18_8xb32_in1k_20210831-fbbb1da6.pth'
        >>> folder = 'https://download.openmmlab.com/mmclassification/v0/resnet/'
        >>> download(folder + name, cache_folder() / name)  # doctest: +SKIP
    """
    _check_url(url)
    path = Path(path)
    job = _Job(url, path, _expected_hash(sha256, path.name, urlsplit(url).path), size)
    with _disk_errors(job):
        if path.exists():
            return _existing(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(job):
            if path.exists():  # from the process that had the lock before
                return _existing(job)
            _fetch(job)
            with job.part.open('rb+') as file:
                os.fsync(file.fileno())
            os.replace(job.part, path)
            job.discard()
    return path


def check_hash(path: Path, content: bytes, sha256: str = '') -> None:
    """Check the content of a file against its hash, if that is known.

    Programs such as mim save what they get under a name with a hash without looking.

    Args:
        path (Path): The file.
        content (bytes): What is in it.
        sha256 (str): Its SHA-256, 64 hexadecimal digits. Defaults to ``''``: the first digits of it
            in the file's name, if there are any.

    Raises:
        DownloadError: If the content has another one.
        ValueError: If ``sha256`` cannot be a SHA-256.
    """
    expected = _expected_hash(sha256, path.name)
    digest = hashlib.sha256(content).hexdigest() if expected else ''
    if not digest.startswith(expected):
        raise DownloadError(
            f'{path} is not what {"it has to be" if sha256 else "its name says"}: its SHA-256 is '
            f'{digest}, expected {_dots(expected)}. The download was cut off, or gave something '
            'else: remove it and download it again'
            + ('' if sha256 else '; or rename it if the digits in its name are no hash')
        )


@dataclass
class _Job:
    """One file to download: what is known about it, and what of it is on the disk."""

    url: str
    path: Path
    sha256: str  # all digits, the first ones, or none
    size: int | None
    old_part: bool = False  # whether bytes of an earlier call are in the part

    @property
    def part(self) -> Path:
        return self.path.with_name(f'{self.path.name}.part')

    @property
    def notes(self) -> Path:
        """Tells which version of which file the part is of."""
        return self.path.with_name(f'{self.path.name}.part.json')

    @property
    def put_it(self) -> str:
        return (
            f'put it into {self.path.parent.absolute()} as {self.path.name}: it is then used from '
            'there without network'
        )

    def validator(self) -> str:
        """What the server called the version that the part is of."""
        try:
            notes = json.loads(self.notes.read_text())
            return notes['validator'] if notes['url'] == self.url else ''
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return ''

    def offset(self) -> int:
        """How many bytes need not be sent again; those of another file are not among them."""
        if not self.part.exists() or not (self.validator() or self.sha256):
            return 0
        return self.part.stat().st_size

    def start_again(self, validator: str) -> None:
        """Forget the part before noting another version, so that the two never meet."""
        self.discard()
        self.old_part = False
        self.notes.write_text(json.dumps({'url': self.url, 'validator': validator}))

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)

    def fault(self, file: Path) -> str:
        """What is wrong with a complete file, in words; nothing if it is the expected one."""
        found = file.stat().st_size
        if found == 0 or self.size not in (None, found):
            return f'it has {found} bytes, expected {self.size or "more"}'
        digest = _sha256(file) if self.sha256 else ''
        if not digest.startswith(self.sha256):
            return f'its SHA-256 is {digest}, expected {_dots(self.sha256)}'
        return ''


def _dots(digits: str) -> str:
    return digits if len(digits) == 64 else f'{digits}... (by its name)'


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open('rb') as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _expected_hash(sha256: str, *names: str) -> str:
    if sha256:
        if not re.fullmatch('[0-9a-fA-F]{64}', sha256):
            raise ValueError(
                f'sha256={sha256!r} is none: give the 64 hexadecimal digits that sha256sum prints, '
                'or nothing'
            )
        return sha256.lower()
    return next(filter(None, map(short_hash, names)), '')


def _check_url(url: str) -> None:
    """Refuse what urllib would take for a file here, or fail at in words of its own."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ('http', 'https') and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise DownloadError(
            f'url={url!r} cannot be downloaded: it has to be http://HOST/... or https://HOST/... '
            'For a file on this machine, give its path to what wants a checkpoint'
        )
    if not re.fullmatch('[!-~]+', url):
        raise DownloadError(
            f'url={url!r} has blanks or characters that are not ASCII: write them as %XX, as the '
            'address line of a browser copies them'
        )


def _existing(job: _Job) -> Path:
    """A file that is there is used if nothing speaks against it, and never overwritten."""
    fault = job.fault(job.path) if job.path.is_file() else 'it is a folder'
    if fault:
        raise DownloadError(
            f'{job.path} is there, but is not the file expected from {job.url}: {fault}. Remove '
            f'it (rm {shlex.quote(str(job.path))}) to download it again, or give another path'
        )
    return job.path


@contextmanager
def _disk_errors(job: _Job) -> Iterator[None]:
    """Say what to do when the disk fails; errors of the network never come out here."""
    try:
        yield
    except OSError as err:
        folder = job.path.parent
        if err.errno in NO_SPACE:
            raise _no_space(job, err.strerror) from err
        raise DownloadError(
            f'cannot keep {job.url} in {folder}: {err}. Get the right to read and write there, or '
            'choose another folder: MMHRFORMER_CACHE says where checkpoints are kept'
        ) from err


def _no_space(job: _Job, reason: str) -> DownloadError:
    return DownloadError(
        f'no space for {job.path}: {reason}. Make room and try again, or choose another folder by '
        'the environment variable MMHRFORMER_CACHE' + _kept(job)
    )


def _kept(job: _Job) -> str:
    if not job.part.exists():
        return ''
    return (
        f'. {decimal(job.part.stat().st_size)} have arrived and are kept in {job.part}; the next '
        'call continues there if the server can'
    )


@contextmanager
def _lock(job: _Job) -> Iterator[None]:
    """Let one process at a time work on the file.

    The lock file stays: were it removed, a process could lock it while another makes a new one.
    """
    with job.path.with_name(f'{job.path.name}.lock').open('a') as file:
        if fcntl is not None:
            _acquire(file, job)
        yield


def _acquire(file: IO, job: _Job) -> None:
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_log(f'Waiting for another process that downloads {job.path}', 'current')
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as err:
        if err.errno not in NO_LOCKS:
            raise
        print_log(
            f'{job.path.parent} is on a file system without locks: let only one process download',
            'current',
            logging.WARNING,
        )


def _fetch(job: _Job) -> None:
    """Download into the part file until that is complete and right."""
    job.old_part = job.part.exists()
    quiet = sys.stderr.isatty()  # there is a progress bar instead
    if not quiet:
        print_log(f'Downloading {job.url} to {job.path}', 'current')
    _try_often(job)
    _refuse_page(job)
    fault = job.fault(job.part)
    if not fault:
        _tell_end(job, quiet)
        return
    job.discard()
    if job.old_part:
        print_log(f'{job.part} of an earlier call was of no use: {fault}', 'current')
        _fetch(job)
        return
    raise DownloadError(
        f'what came from {job.url} is not the expected file: {fault}. It was deleted. Try again; '
        'if that does not help, the file there was replaced or is damaged: ask its source for the '
        f'right one and {job.put_it}'
    )


def _tell_end(job: _Job, quiet: bool) -> None:
    if not job.sha256:
        print_log(
            f'{job.path.name} from {job.url} could not be checked, as neither sha256 nor its name '
            f'says what it should be. Its SHA-256 is {_sha256(job.part)}: compare it with what '
            'the source of the file says',
            'current',
            logging.WARNING,
        )
    elif not quiet:
        size = decimal(job.part.stat().st_size)
        print_log(f'Downloaded {job.path}: {size}, SHA-256 as expected', 'current')


def _try_often(job: _Job) -> None:
    for count in range(1, TRIES + 1):
        try:
            return _transfer(job)
        except _PassingError as err:
            if count == TRIES:
                raise DownloadError(
                    f'cannot download {job.url}: {err}; {TRIES} tries. Look whether the network '
                    'works and try again later, or download it by hand and '
                    f'{job.put_it}{_kept(job)}'
                ) from err
            wait = min(2 ** (count - 1) if err.wait is None else err.wait, LONGEST_WAIT)
            again = f'try {count + 1} of {TRIES} in {wait:.0f} s'
            print_log(f'{job.path.name}: {err}; {again}', 'current', logging.WARNING)
            sleep(wait)


def _transfer(job: _Job) -> None:
    """Let one answer of the server complete the part.

    Raises:
        _PassingError: If another try may help.
        DownloadError: If none will.
    """
    offset = job.offset()
    response = _ask(job, offset)
    if response is None:
        return
    with response:
        start, total = _span(response)
        _check_answer(job, response, offset, start, total)
        total = job.size if total is None else total
        if start == 0:
            job.start_again(_validator(response.headers))
        _write(job, response, start, total)
    arrived = job.part.stat().st_size
    if total is not None and arrived < total:
        raise _PassingError(f'the connection ended after {arrived} of {total} bytes')


def _ask(job: _Job, offset: int) -> HTTPResponse | None:
    """Ask for what is missing; None if the server says that nothing is."""
    headers = {'User-Agent': f'mmhrformer/{__version__}'}
    if offset:
        headers['Range'] = f'bytes={offset}-'
        if job.validator():  # send everything if the file is another one by now
            headers['If-Range'] = job.validator()
    try:
        return build_opener(_Redirects).open(Request(job.url, headers=headers), timeout=TIMEOUT)
    except HTTPError as err:
        with err:
            if err.code != 416 or not offset:
                raise _refused(job, err) from err
            _check_complete(job, err.headers, offset)
            return None
    except InvalidURL as err:
        raise DownloadError(f'cannot download {job.url}: {err}. Correct the address') from err
    except (OSError, HTTPException) as err:
        reason = err.reason if isinstance(err, URLError) else err
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f'cannot download {job.url}: {reason}. If your network has certificates of its '
                'own, name their file by the environment variable SSL_CERT_FILE'
            ) from err
        raise _PassingError(f'no connection to {urlsplit(job.url).netloc} ({reason})') from err


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        schemes = ('https',) if req.type == 'https' else ('http', 'https')
        if urlsplit(newurl).scheme not in schemes:
            fp.close()
            raise DownloadError(
                f'{req.full_url} leads to {newurl}, which is not {" or ".join(schemes)}, so that '
                'anybody on the way could change the file: give another address'
            )
        code = 307 if code == 308 else code  # Python 3.10 does not know 308, which means the same
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    http_error_308 = HTTPRedirectHandler.http_error_302


def _refused(job: _Job, err: HTTPError) -> Exception:
    answer = f'{err.code} {err.reason}'
    if err.code in PASSING:
        return _PassingError(f'the server answers {answer}', _retry_after(err.headers))
    if err.code in (404, 410):
        return DownloadError(
            f'there is no file at {job.url} ({answer}): the link is dead. If you find the file '
            f'elsewhere, download it by hand and {job.put_it}'
        )
    if err.code in (401, 403):
        return DownloadError(
            f'the server does not give {job.url} to everybody ({answer}). If you have access, '
            f'download it by hand and {job.put_it}'
        )
    return DownloadError(
        f'cannot download {job.url}: {answer}. If a browser can, download it by hand and '
        f'{job.put_it}'
    )


def _retry_after(headers: Message) -> float | None:
    """Seconds that the server asks to wait: it may say how many, or until when."""
    value = headers.get('Retry-After', '').strip()
    if value.isdecimal():
        return int(value)
    try:
        until = parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    if until.tzinfo is None:  # '-0000'
        until = until.replace(tzinfo=timezone.utc)
    return max(0.0, (until - datetime.now(timezone.utc)).total_seconds())


def _validator(headers: Message) -> str:
    """The server's name for this version of the file; weak ETags cannot say that bytes agree."""
    tag = headers.get('ETag', '')
    return headers.get('Last-Modified', '') if not tag or tag.startswith('W/') else tag


def _span(response: HTTPResponse) -> tuple[int, int | None]:
    """Where an answer's bytes begin in the file, and how many the file has if that is known."""
    if response.status != 206:
        return 0, response.length
    found = re.fullmatch(r'bytes (\d+)-(\d+)/(\d+|\*)', response.headers.get('Content-Range', ''))
    if found is None:
        return -1, None
    return int(found[1]), None if found[3] == '*' else int(found[3])


def _check_answer(
    job: _Job, response: HTTPResponse, offset: int, start: int, total: int | None
) -> None:
    """Look at all that can be known before the first byte is written."""
    if response.headers.get_content_type() == 'text/html':
        raise _page(job)
    if start not in (0, offset):
        job.discard()
        raise _PassingError('the server sent another part of the file than asked for', 0)
    if start:
        _check_version(job, response.headers)
    if total is not None and job.size not in (None, total):
        job.discard()
        raise DownloadError(
            f'the file at {job.url} has {total} bytes, expected {job.size}: it was replaced, or '
            f'the address is wrong. If you find the right one, {job.put_it}'
        )
    free = shutil.disk_usage(job.path.parent).free
    if start == 0 and job.part.exists():
        free += job.part.stat().st_size  # about to be deleted
    if total is not None and total - start > free:
        raise _no_space(job, f'{decimal(total - start)} are to come, {decimal(free)} are free')


def _check_version(job: _Job, headers: Message) -> None:
    """Not every server heeds If-Range."""
    now = _validator(headers)
    if now and job.validator() not in ('', now):
        job.discard()
        raise _PassingError('the file on the server is another one by now', 0)


def _check_complete(job: _Job, headers: Message, offset: int) -> None:
    """The server has nothing from the offset on: the part is complete, or of no use."""
    _check_version(job, headers)
    if headers.get('Content-Range', '') != f'bytes */{offset}':
        job.discard()
        raise _PassingError(f'{job.part.name} does not fit the file on the server', 0)


def _write(job: _Job, response: HTTPResponse, start: int, total: int | None) -> None:
    with (
        _progress(job.path.name, start, total) as advance,
        job.part.open('ab' if start else 'wb') as file,
    ):
        for chunk in _chunks(response):
            file.write(chunk)
            advance(len(chunk))


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    """The body as it comes; unlike ``read``, ``read1`` loses nothing when the connection breaks."""
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, HTTPException) as err:
            raise _PassingError(f'the connection broke ({err})') from err
        if not chunk:
            return
        yield chunk


@contextmanager
def _progress(name: str, start: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar if there is somebody to see it."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    columns = (
        TextColumn('{task.description}', markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, completed=start, total=total)
        yield lambda count: progress.advance(task, count)


def _refuse_page(job: _Job) -> None:
    with job.part.open('rb') as file:
        head = file.read(512)
    if head.removeprefix(b'\xef\xbb\xbf').lstrip().lower().startswith((b'<!doctype', b'<html')):
        job.discard()
        raise _page(job)


def _page(job: _Job) -> DownloadError:
    return DownloadError(
        f'{job.url} gives a web page, not a checkpoint: a page for sharing, logging in or '
        f'confirming. Open it in a browser, download the file by hand and {job.put_it}'
    )

"""Download checkpoints; a file gets its name only after its hash was checked.

On urllib, filelock and rich: torch.hub's downloader has no time limit, and follows redirects to
http.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import ssl
import sys
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock
from mmengine.logging import print_log
from rich.console import Console
from rich.progress import wrap_file
from torch.hub import get_dir

TIMEOUT = 30  # seconds without a byte
WAITS = (1, 4)  # seconds before the second and the third try
TRANSIENT_CODES = (408, 429, 500, 502, 503, 504)
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
CHECK_NETWORK = (
    'See whether the network works (https_proxy names a proxy, SSL_CERT_FILE certificates of your '
    'own) and try again later. '
)
URL = re.compile(r'(?ai)https?://[\w.-]+(:\d+)?/[!-~]+')
# The first digits of the SHA-256, as torch.hub and OpenMMLab write them into names: name-HASH.pth
# or, in mmpose, name-HASH_DATE.pth. A date, name-20220316.pth, looks the same but is none.
SHORT_HASH = re.compile(
    r'-(?!20\d\d(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])\.)([0-9a-f]{8,64})(?:_\d{8})?(?:\.\w+)+$'
)


class DownloadError(RuntimeError):
    """A file could not be downloaded. The message says why, and what to do."""


class TransientError(DownloadError):
    """A download failed in a way that may be over at the next try."""


def cache_folder() -> Path:
    """Folder of the downloaded checkpoints.

    Returns:
        Path: ``$MMHRFORMER_CACHE``, else ``checkpoints/mmhrformer`` in the folder of torch.hub,
        which ``$TORCH_HOME`` moves. It need not exist yet.

    Examples:
        >>> cache_folder().name  # doctest: +SKIP
        'mmhrformer'
    """
    if os.environ.get('MMHRFORMER_CACHE'):
        return Path(os.environ['MMHRFORMER_CACHE']).expanduser()
    return Path(get_dir()) / 'checkpoints' / 'mmhrformer'


def download(url: str, path: Path, sha256: str = '') -> None:
    """Download a file, unless it is there already; check it either way.

    Of several processes one downloads and the others wait for it (``NAME.lock``, which stays).

    Args:
        url (str): Address of the file; http or https.
        path (Path): Path to save it under. Its folder is made if need be.
        sha256 (str): All 64 digits of its SHA-256. Defaults to ``''``: the first ones in its name.

    Raises:
        DownloadError: If the file cannot be had, or is there and is not the expected one.
        ValueError: If ``sha256`` cannot be a SHA-256, or is needed as the name has no hash.
    """
    expected = _expected_hash(sha256, path.name)
    if not expected:
        raise ValueError(
            f'{url} could not be checked, so it is not downloaded: the name {path.name} has no '
            'digits of its SHA-256, name-0123abcd.pth. Give all 64 as sha256'
        )
    if not URL.fullmatch(url):
        raise DownloadError(
            f'url={url!r} cannot be downloaded: it has to be http://HOST/... or https://HOST/... '
            'without blanks. Of a file on this machine, give the path'
        )
    try:
        if path.exists():  # perhaps in a folder that is read-only
            check_hash(path, path.read_bytes(), sha256)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{path}.lock'):
            if not path.exists():  # from the process that had the lock before
                _download_with_retries(url, path, expected)
    except OSError as err:
        raise DownloadError(
            f'cannot keep {url} as {path}: {err}. Make room or get the right to read and write '
            'there, or name another folder by the environment variable MMHRFORMER_CACHE'
        ) from err


def check_hash(path: Path, content: bytes, sha256: str = '') -> None:
    """Check the content of a file against the SHA-256 given, or else the digits in its name.

    Programs such as mim save whatever they get under a name with a hash, without checking it.

    Raises:
        DownloadError: If the content has another one.
        ValueError: If ``sha256`` cannot be a SHA-256.
    """
    expected = _expected_hash(sha256, path.name)
    digest = hashlib.sha256(content).hexdigest() if expected else ''
    if not digest.startswith(expected):
        raise DownloadError(
            f'{path} is not what {"it has to be" if sha256 else "its name says"}: its SHA-256 is '
            f'{digest}, expected {expected}. The download was cut off, or gave something '
            'else: remove it and download it again'
            + ('' if sha256 else '; or rename it if the digits in its name are no hash')
        )


def _expected_hash(sha256: str, name: str) -> str:
    """All digits, or the first ones, which the name has, or none."""
    if sha256 and not re.fullmatch('[0-9a-fA-F]{64}', sha256):
        raise ValueError(
            f'sha256={sha256!r} is none: give the 64 hexadecimal digits that sha256sum prints, '
            'or nothing'
        )
    found = SHORT_HASH.search(name)
    return sha256.lower() or (found[1] if found else '')


class _Redirects(HTTPRedirectHandler):
    """Follows redirects, but none from https to what anybody on the way could change."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if req.type == 'https' and not newurl.startswith('https:'):
            raise HTTPError(newurl, code, f'to {newurl}, which is not https', headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download_with_retries(url: str, path: Path, expected: str) -> None:
    print_log(f'Downloading {url} to {path}', 'current')
    # Removed with all that is in it, whatever happens.
    with TemporaryDirectory(prefix=f'{path.name}.', dir=path.parent) as folder:
        file = Path(folder, path.name)
        for wait in (*WAITS, None):
            try:
                _download_once(url, file, expected)
                os.replace(file, path)
                return
            except DownloadError as err:
                transient, failure = isinstance(err, TransientError), err
            if wait is None or not transient:
                break
            print_log(f'{path.name}: {failure}. Next try in {wait} s', 'current', logging.WARNING)
            sleep(wait)
    raise DownloadError(
        f'cannot download {url}: {failure}. {CHECK_NETWORK if transient else ""}By hand: download '
        f'it in a browser and put it here: {path}. It is then used from there without network'
    ) from failure


def _download_once(url: str, file: Path, expected: str) -> None:
    request = Request(url, headers={'User-Agent': 'mmhrformer'})
    try:
        with build_opener(_Redirects).open(request, timeout=TIMEOUT) as answer:
            size = int(answer.headers.get('Content-Length', 0))
            bar = dict(console=Console(stderr=True), disable=not sys.stderr.isatty())
            with file.open('wb') as out, wrap_file(answer, size, **bar) as source:
                shutil.copyfileobj(source, out)
    except HTTPError as err:
        dead = ': the link is dead' if err.code in (404, 410) else ''
        kind = TransientError if err.code in TRANSIENT_CODES else DownloadError
        raise kind(f'the server answers {err.code} {err.reason}{dead}') from err
    except NETWORK_ERRORS as err:
        raise TransientError(f'the connection failed ({getattr(err, "reason", err)})') from err
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest.startswith(expected):
        return
    if content[:512].removeprefix(b'\xef\xbb\xbf').lstrip().startswith(b'<'):
        raise DownloadError(
            'it gives a web page, not a checkpoint: for logging in, confirming, sharing'
        )
    raise TransientError(
        f'{len(content)} bytes came, and their SHA-256 is {digest}, expected {expected}: the '
        'connection was cut, or the file there is another one by now'
    )

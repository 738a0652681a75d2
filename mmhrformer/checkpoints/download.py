"""Download of checkpoints; a file gets its final name only after its hash has been verified.

Built on urllib, filelock and rich, since torch.hub's downloader has no timeout and follows
redirects to http.
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

TIMEOUT = 30  # seconds without any data
WAITS = (1, 4)  # seconds before the second and the third attempt
TRANSIENT_CODES = (408, 429, 500, 502, 503, 504)
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
CHECK_NETWORK = (
    'Check the network (set https_proxy for a proxy, SSL_CERT_FILE for your own certificates) and '
    'try again later. '
)
URL = re.compile(r'(?ai)https?://[\w.-]+(:\d+)?/[!-~]+')
# The first digits of the SHA-256, which torch.hub and OpenMMLab put into file names: name-HASH.pth
# or, in mmpose, name-HASH_DATE.pth. A date as in name-20220316.pth is not a hash.
SHORT_HASH = re.compile(
    r'-(?!20\d\d(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])\.)([0-9a-f]{8,64})(?:_\d{8})?(?:\.\w+)+$'
)


class DownloadError(RuntimeError):
    """A file could not be downloaded. The message gives the reason and the remedy."""


class TransientError(DownloadError):
    """A download failed, but another attempt may succeed."""


def cache_folder() -> Path:
    """Folder of the downloaded checkpoints.

    Returns:
        Path: ``$MMHRFORMER_CACHE``, or by default ``checkpoints/mmhrformer`` in torch.hub's folder,
        which ``$TORCH_HOME`` sets. It may not exist yet.

    Examples:
        >>> cache_folder().name  # doctest: +SKIP
        'mmhrformer'
    """
    if os.environ.get('MMHRFORMER_CACHE'):
        return Path(os.environ['MMHRFORMER_CACHE']).expanduser()
    return Path(get_dir()) / 'checkpoints' / 'mmhrformer'


def download(url: str, path: Path, sha256: str = '') -> None:
    """Download a file unless it exists already, and verify it in either case.

    Of several processes, one downloads and the others wait (by ``NAME.lock``, which is kept).

    Args:
        url (str): URL of the file; http or https.
        path (Path): Path to save it to. The folder is created if needed.
        sha256 (str): All 64 digits of its SHA-256. Defaults to ``''``: the first ones in its name.

    Raises:
        DownloadError: If the file cannot be downloaded, or exists but is not the expected one.
        ValueError: If ``sha256`` is invalid, or is missing and the name has no hash.
    """
    expected = _expected_hash(sha256, path.name)
    if not expected:
        raise ValueError(
            f'{url} could not be verified, so it is not downloaded: the name {path.name} has no '
            'digits of its SHA-256, as in name-0123abcd.pth. Pass all 64 digits as sha256'
        )
    if not URL.fullmatch(url):
        raise DownloadError(
            f'url={url!r} cannot be downloaded: expected http://HOST/... or https://HOST/... '
            'without spaces. For a local file, pass the path'
        )
    try:
        if path.exists():  # checked before locking, since the folder may be read-only
            check_hash(path, path.read_bytes(), sha256)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{path}.lock'):
            if not path.exists():  # unless another process has just downloaded it
                _download_with_retries(url, path, expected)
    except OSError as err:
        raise DownloadError(
            f'cannot save {url} as {path}: {err}. Free disk space or get read and write permission '
            'there, or set the environment variable MMHRFORMER_CACHE to another folder'
        ) from err


def check_hash(path: Path, content: bytes, sha256: str = '') -> None:
    """Verify the content of a file by its SHA-256, or by the digits in its name.

    Programs such as mim save any response under a name with a hash, without verifying it.

    Raises:
        DownloadError: If the content has a different SHA-256.
        ValueError: If ``sha256`` is invalid.
    """
    expected = _expected_hash(sha256, path.name)
    digest = hashlib.sha256(content).hexdigest() if expected else ''
    if not digest.startswith(expected):
        raise DownloadError(
            f'{path} is not {"the expected file" if sha256 else "what its name says"}: its SHA-256 '
            f'is {digest}, expected {expected}. The download was truncated, or is another file: '
            'remove it and download it again'
            + ('' if sha256 else '; or rename it if the digits in its name are not a hash')
        )


def _expected_hash(sha256: str, name: str) -> str:
    """The given SHA-256, or the digits in the name, or ''."""
    if sha256 and not re.fullmatch('[0-9a-fA-F]{64}', sha256):
        raise ValueError(
            f'sha256={sha256!r} is not a SHA-256: expected the 64 hexadecimal digits that '
            'sha256sum prints, or nothing'
        )
    found = SHORT_HASH.search(name)
    return sha256.lower() or (found[1] if found else '')


class _Redirects(HTTPRedirectHandler):
    """Redirect handler that refuses redirects from https to insecure protocols."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if req.type == 'https' and not newurl.startswith('https:'):
            raise HTTPError(newurl, code, f'to {newurl}, which is not https', headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download_with_retries(url: str, path: Path, expected: str) -> None:
    print_log(f'Downloading {url} to {path}', 'current')
    # A temporary folder, so that no partial file is left behind.
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
            print_log(f'{path.name}: {failure}. Retrying in {wait} s', 'current', logging.WARNING)
            sleep(wait)
    raise DownloadError(
        f'cannot download {url}: {failure}. {CHECK_NETWORK if transient else ""}By hand: '
        f'download it in a browser and put it here: {path}. It is then used without network access'
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
            'the server sent a web page, not a checkpoint, such as a login or sharing page'
        )
    raise TransientError(
        f'received {len(content)} bytes, whose SHA-256 is {digest}, expected {expected}: the '
        'connection was cut, or the file on the server has changed'
    )

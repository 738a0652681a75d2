"""A download ends with the right file or a clear error, whatever the server does."""

from __future__ import annotations

import errno
import hashlib
import io
import multiprocessing
import os
import re
from contextlib import nullcontext
from pathlib import Path
from time import sleep
from urllib.error import HTTPError
from urllib.request import Request

import pytest
from filelock import FileLock
from http_server import Answer, Server

from mmhrformer.checkpoints import download as module
from mmhrformer.checkpoints.download import DownloadError, _Redirects, download

CONTENT = bytes(range(256)) * 1200
SHA = hashlib.sha256(CONTENT).hexdigest()
OTHER = CONTENT[::-1]
NAME = f'model-{SHA[:8]}.pth'
NOWHERE = 'http://127.0.0.1:9/x'


@pytest.fixture(autouse=True)
def notes(monkeypatch):
    """No proxy, no terminal, no waiting: what was logged, and the seconds that were to be slept."""
    found = []
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr('sys.stderr', io.StringIO())
    monkeypatch.setattr(module, 'TIMEOUT', 5)
    monkeypatch.setattr(module, 'sleep', found.append)
    monkeypatch.setattr(module, 'print_log', lambda text, *_: found.append(text))
    return found


def left(folder: Path) -> set[str]:
    """The files in a folder, except the lock."""
    return {path.name for path in folder.iterdir() if path.suffix != '.lock'}


BROKEN_CHUNK = Answer(headers={'Transfer-Encoding': 'chunked'}, body=b'9\r\ncut')
# What the server does before it does well.
RECOVERED = {
    'well': [],
    'cut, then reset': [Answer(cut=1000), Answer(cut=0, reset=True)],
    'broken chunk, then busy': [BROKEN_CHUNK, Answer(429)],
    'errors': [Answer(500), Answer(504)],
    'wrong, then nothing': [Answer(body=OTHER), Answer(body=b'')],
    'redirect': [Answer(302, {'Location': '/elsewhere.pth'})],
}


@pytest.mark.parametrize('case', RECOVERED)
def test_server_recovers(case, tmp_path, notes):
    answers = RECOVERED[case]
    with Server(CONTENT, answers) as server:
        path = tmp_path / 'new' / NAME
        download(server.url(NAME), path)
    assert path.read_bytes() == CONTENT
    assert left(path.parent) == {NAME}
    assert len(server.requests) == len(answers) + 1
    assert notes[0] == f'Downloading {server.url(NAME)} to {path}'
    assert notes[2::2] == ([1, 4] if len(answers) == 2 else [])
    assert all(text.startswith(f'{NAME}: ') for text in notes[1::2])


# What the server does, for ever -> its answer, words of the error, requests.
FAILED = {
    'cut': (Answer(cut=9), r': received 9 bytes, .*cut.*network.*https_proxy', 3),
    'resets': (Answer(cut=0, reset=True), r'connection failed.*network.*browser', 3),
    '503': (Answer(503), r'answers 503 .*try again later', 3),
    '404': (Answer(404), r'answers 404 Not Found: the link is dead\. By hand', 1),
    '410': (Answer(410), 'the link is dead', 1),
    '401': (Answer(401), r'answers 401 Unauthorized\. By hand', 1),
    'page': (Answer(body=b'\n<!DOCTYPE html>'), r'a web page, not a checkpoint.*\. By hand', 1),
    'page with a mark': (Answer(body=b'\xef\xbb\xbf <HTML>'), 'web page', 1),
    'wrong hash': (Answer(body=OTHER), rf'received {len(OTHER)} bytes, .* expected {SHA[:8]}:', 3),
    'redirect to a file': (Answer(302, {'Location': 'file:///etc/passwd'}), 'not allowed', 1),
}


@pytest.mark.parametrize('case', FAILED)
def test_server_fails(case, tmp_path):
    answer, words, count = FAILED[case]
    path = tmp_path / NAME
    with Server(CONTENT, finally_=answer) as server, pytest.raises(DownloadError, match=words) as e:
        download(server.url(NAME), path)
    assert len(server.requests) == count
    assert f'cannot download {server.url(NAME)}: ' in str(e.value)
    assert f'browser and put it here: {path}. It is then used without network' in str(e.value)
    assert left(tmp_path) == set()


def test_silent_server(tmp_path, monkeypatch, notes):
    monkeypatch.setattr(module, 'TIMEOUT', 0.1)
    answer, words = Answer(cut=1000, hold=True), r'timed out.*network'
    with Server(CONTENT, finally_=answer) as server, pytest.raises(DownloadError, match=words):
        download(server.url(NAME), tmp_path / NAME)
    assert notes[2::2] == [1, 4]  # between three attempts
    assert left(tmp_path) == set()


def test_no_network(tmp_path):
    with pytest.raises(DownloadError, match=f'{NOWHERE}: .* failed .*refused.*SSL_CERT_FILE'):
        download(NOWHERE, tmp_path / NAME)


def test_whole_hash_is_checked(tmp_path):
    path = tmp_path / 'model.pth'
    with Server(CONTENT) as server:
        download(server.url(), path, SHA.upper())
        path.unlink()
        server.files = OTHER
        with pytest.raises(DownloadError, match=f'expected {SHA}'):
            download(server.url(), path, SHA)
        server.files = CONTENT
        almost = SHA[:-1] + ('1' if SHA[-1] == '0' else '0')
        with pytest.raises(DownloadError, match=f'SHA-256 is {SHA}, expected {almost}'):
            download(server.url(), path, almost)
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    ('name', 'found'),
    [
        *(('model.pth', ''), ('model-0123456.pth', ''), ('model-0123456g.pth', '')),
        ('model-0123456789abcdef.pth.tar', '0123456789abcdef'),
        *((name, '01234567') for name in ('a-01234567_20220316.pth', 'a_20220316-01234567.pth')),
        *(('model-20220316.pth', ''), ('model-20221399.pth', '20221399')),  # a date, and none
    ],
)
def test_hash_in_a_name(name, found):
    with pytest.raises(DownloadError, match=rf'expected {found}\.') if found else nullcontext():
        module.check_hash(Path(name), b'')


# What is there already -> its content, sha256, words of the error.
EXISTING = {
    'good by its name': (NAME, CONTENT, '', None),
    'good by sha256': ('model.pth', CONTENT, SHA, None),
    'bad by its name': (NAME, OTHER, '', 'its name says.* SHA-256 .*remove it and'),
    'bad by sha256': (
        'model.pth',
        OTHER,
        SHA,
        f'not the expected file.*expected {SHA}.*remove it and',
    ),
}


@pytest.mark.parametrize('case', EXISTING)
def test_existing_file_is_checked_without_network(case, tmp_path):
    name, content, sha256, words = EXISTING[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DownloadError, match=words) if words else nullcontext():
        download(NOWHERE, path, sha256)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]  # a folder may be read-only


def test_full_disk(tmp_path, monkeypatch):
    def fail(*args) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr('shutil.copyfileobj', fail)
    words = rf'cannot save \S+ as .*{NAME}: .*No space left.*Free disk space.*MMHRFORMER_CACHE'
    with Server(CONTENT) as server, pytest.raises(DownloadError, match=words):
        download(server.url(NAME), tmp_path / NAME)
    assert len(server.requests) == 1
    assert left(tmp_path) == set()


def test_redirect_from_https_to_http():
    """Insecure URLs are not followed, even with a hash."""
    request = Request('https://host/x')
    for url in ('http://host/x', 'ftp://host/x'):
        with pytest.raises(HTTPError, match=f'to {url}, which is not https'):
            _Redirects().redirect_request(request, io.BytesIO(), 302, '', {}, url)
    assert _Redirects().redirect_request(request, io.BytesIO(), 302, '', {}, 'https://host/y')


def test_folder_of_no_use(tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / NAME).mkdir()
    for path in (tmp_path / 'file' / NAME, tmp_path / NAME):
        with pytest.raises(DownloadError, match=f'cannot save {NOWHERE} as .*MMHRFORMER_CACHE'):
            download(NOWHERE, path)


@pytest.mark.parametrize(
    'url',
    [
        *('file:///tmp/model.pth', 'ftp://host/model.pth', '/tmp/model.pth', 'https:///model.pth'),
        *('mmhrformer://model.pth', 'http://host:port/model.pth', 'http://[host/model.pth'),
        *('http://host/my model.pth', 'http://host/mödel.pth', 'http://host/model.pth\n'),
    ],
)
def test_bad_url(url, tmp_path):
    with pytest.raises(DownloadError, match=re.escape(f'url={url!r}') + '.*expected http'):
        download(url, tmp_path / NAME)


def test_bad_or_no_sha256(tmp_path):
    for sha256 in ('abc', f'sha256:{SHA}', SHA[:8]):
        with pytest.raises(ValueError, match=f'sha256={sha256!r}'):
            download(NOWHERE, tmp_path / NAME, sha256)
    with pytest.raises(ValueError, match=r'could not be verified.* Pass all 64 digits as sha256'):
        download(NOWHERE, tmp_path / 'model.pth')


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr('sys.stderr', terminal)
    with Server(CONTENT) as server:
        download(server.url(NAME), tmp_path / NAME)
    assert '307.2/307.2 kB' in terminal.getvalue()


def test_processes_wait_for_one_another(tmp_path, monkeypatch):
    """One of four processes downloads; when it is killed, another one continues."""
    fork = multiprocessing.get_context('fork')  # importing torch again takes seconds
    tried, attempts = fork.Semaphore(0), []  # the list is that of a process

    class Lock(FileLock):
        def _acquire(self) -> None:
            super()._acquire()
            if not attempts:
                tried.release()
            attempts.append(self)

    monkeypatch.setattr(module, 'FileLock', Lock)
    with Server(CONTENT, [Answer(cut=1000, hold=True)]) as server:
        args = server.url(NAME), tmp_path / NAME
        first, *others = (fork.Process(target=download, args=args, daemon=True) for _ in range(4))
        for process in (first, *others):
            process.start()
            tried.acquire()
        while not server.requests:
            assert first.is_alive()
            sleep(0.01)
        assert len(server.requests) == 1
        assert not (tmp_path / NAME).exists()
        first.kill()
        for process in others:
            process.join()
            assert process.exitcode == 0
    assert len(server.requests) == 2
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv('MMHRFORMER_CACHE', raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert module.cache_folder() == tmp_path / 'hub/checkpoints/mmhrformer'
    monkeypatch.setenv('MMHRFORMER_CACHE', '~/here')
    assert module.cache_folder() == Path.home() / 'here'

"""A download ends with the right file or a clear error, whatever the server does."""

from __future__ import annotations

import errno
import hashlib
import importlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import socket
import ssl
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
from http_server import Answer, Server

# By its name: the package may have the function of the same name as an attribute.
module = importlib.import_module('mmhrformer.checkpoints.download')
download, DownloadError = module.download, module.DownloadError

CONTENT = bytes(range(256)) * 1200
SHA = hashlib.sha256(CONTENT).hexdigest()
OTHER = CONTENT[::-1]
NAME = f'model-{SHA[:8]}.pth'
TAG = f'"{hashlib.md5(CONTENT).hexdigest()}"'
PAGE = b'\n<!DOCTYPE html><html>please log in</html>'


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No proxy, no terminal, no waiting."""
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.delenv('MMHRFORMER_CACHE', raising=False)
    monkeypatch.setattr('sys.stderr', io.StringIO())
    monkeypatch.setattr(module, 'TIMEOUT', 5)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """What would have been slept."""
    found = []
    monkeypatch.setattr(module, 'sleep', found.append)
    return found


@pytest.fixture(autouse=True)
def log(monkeypatch):
    """What was logged: (text, level)."""
    found = []

    def print_log(text, logger, level=logging.INFO):
        assert logger == 'current'
        found.append((text, level))

    monkeypatch.setattr(module, 'print_log', print_log)
    return found


def left(folder: Path) -> set[str]:
    """The endings of what lies in a folder beside the lock."""
    names = {path.name for path in folder.iterdir() if path.suffix != '.lock'}
    return {name.removeprefix(NAME) for name in names}


def leave_part(path: Path, content: bytes, url: str, validator: str = TAG) -> None:
    """As an interrupted earlier call does."""
    path.with_name(f'{path.name}.part').write_bytes(content)
    notes = json.dumps({'url': url, 'validator': validator})
    path.with_name(f'{path.name}.part.json').write_text(notes)


def ranges(server: Server) -> list[str | None]:
    return [request.get('Range') for request in server.requests]


# What the server does -> its answers, the ranges it must have been asked for.
RECOVERED = {
    'well': ([], [None]),
    'cut': ([Answer(cut=1000)], [None, 'bytes=1000-']),
    'cut thrice': (
        [Answer(cut=1000), Answer(cut=50), Answer(cut=7)],
        [None, 'bytes=1000-', 'bytes=1050-', 'bytes=1057-'],
    ),
    'cut at nothing': ([Answer(cut=0)], [None, None]),
    'cut chunks': ([Answer(cut=1000, chunked=True)], [None, 'bytes=1000-']),
    'chunks': ([Answer(chunked=True)], [None]),
    'no length': ([Answer(length=False)], [None]),
    'no ranges': ([Answer(cut=1000), Answer(ranges=False)], [None, 'bytes=1000-']),
    'no tag, but a hash': ([Answer(cut=1000, etag=False)], [None, 'bytes=1000-']),
    'weak tag': ([Answer(cut=9, headers={'ETag': 'W/"1"'})], [None, 'bytes=9-']),
    'another range': (
        [Answer(cut=9), Answer(206, {'Content-Range': 'bytes 5-9/10'}, b'abcde')],
        [None, 'bytes=9-', None],
    ),
    'no word on the range': ([Answer(cut=9), Answer(206, {}, b'a')], [None, 'bytes=9-', None]),
    'range without total': (
        [Answer(cut=9), Answer(headers={'Content-Range': f'bytes 9-{len(CONTENT) - 1}/*'})],
        [None, 'bytes=9-'],
    ),
    '500': ([Answer(500)], [None, None]),
    'all passing errors': ([Answer(429), Answer(502), Answer(504)], [None] * 4),
    'redirect': ([Answer(302, {'Location': '/elsewhere.pth'})], [None, None]),
    'lasting redirect': ([Answer(308, {'Location': '/elsewhere.pth'})], [None, None]),
    'redirect of the rest': (
        [Answer(cut=1000), Answer(302, {'Location': '/elsewhere.pth'})],
        [None, 'bytes=1000-', 'bytes=1000-'],
    ),
}


@pytest.mark.parametrize('case', RECOVERED)
def test_server_recovers(case, tmp_path):
    answers, asked = RECOVERED[case]
    with Server(CONTENT, answers) as server:
        path = download(server.url(NAME), tmp_path / NAME)
    assert path.read_bytes() == CONTENT
    assert left(tmp_path) == {''}
    assert ranges(server) == asked
    assert all(r['User-Agent'].startswith('mmhrformer/') for r in server.requests)


def test_reset_connection(tmp_path):
    with Server(CONTENT, [Answer(cut=1000, reset=True)]) as server:
        path = download(server.url(NAME), tmp_path / NAME)
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_silent_server(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'TIMEOUT', 0.1)
    start = time.monotonic()
    with Server(CONTENT, [Answer(cut=1000, hold=True)]) as server:
        path = download(server.url(NAME), tmp_path / NAME)
    assert time.monotonic() - start < 4
    assert path.read_bytes() == CONTENT
    assert ranges(server) == [None, 'bytes=1000-']


# What the server does, for ever -> its answer, words of the error, what stays, requests.
FAILED = {
    'cut': (Answer(cut=9), r'36 of 307200 bytes; 4 tries.*by hand.*36 bytes have', 'part', 4),
    'cut, no ranges': (Answer(cut=9, ranges=False), r'9 of 307200 bytes.*4 tries', 'part', 4),
    'resets': (Answer(cut=0, reset=True), '4 tries', 'any', 4),
    '503': (Answer(503), r'answers 503 .*; 4 tries.*network', '', 4),
    '404': (Answer(404), r'model-\w+\.pth \(404.*link is dead.*by hand and put it into', '', 1),
    '410': (Answer(410), 'link is dead', '', 1),
    '401': (Answer(401), 'to everybody', '', 1),
    '403': (Answer(403), 'to everybody', '', 1),
    '416 at the start': (Answer(416), '416', '', 1),
    '418': (Answer(418), "418 I'm a Teapot.*by hand", '', 1),
    'page': (
        Answer(headers={'Content-Type': 'text/html; charset=utf-8'}, body=b'sign in'),
        'web page.*sharing.*browser.*by hand and put it into',
        '',
        1,
    ),
    'page in disguise': (Answer(body=PAGE), 'web page', '', 1),
    'old page': (Answer(body=b'\xef\xbb\xbf <HTML><body>'), 'web page', '', 1),
    'wrong hash': (
        Answer(body=OTHER),
        f'SHA-256 is {hashlib.sha256(OTHER).hexdigest()}, expected {SHA[:8]}.* deleted.*again',
        '',
        1,
    ),
    'cut, no length': (Answer(cut=1000, length=False), 'SHA-256 is', '', 1),
    'nothing': (Answer(body=b''), 'has 0 bytes', '', 1),
    'redirect to a file': (Answer(302, {'Location': 'file:///etc/passwd'}), 'not allowed', '', 1),
    'redirect to ftp': (Answer(302, {'Location': 'ftp://x/y'}), 'leads to ftp://x/y', '', 1),
    'redirect in a circle': (Answer(302, {'Location': '/circle'}), 'infinite loop', '', None),
}


@pytest.mark.parametrize('case', FAILED)
def test_server_fails(case, tmp_path):
    answer, words, stays, count = FAILED[case]
    with Server(CONTENT, finally_=answer) as server, pytest.raises(DownloadError, match=words) as e:
        download(server.url(NAME), tmp_path / NAME)
    assert count in (None, len(server.requests))
    assert '127.0.0.1' in str(e.value)
    assert (
        left(tmp_path)
        in {
            '': [set()],
            'part': [{'.part', '.part.json'}],
            'any': [set(), {'.part', '.part.json'}],
        }[stays]
    )


def test_waits_grow(tmp_path, waits, log):
    with Server(CONTENT, finally_=Answer(500)) as server, pytest.raises(DownloadError):
        download(server.url(NAME), tmp_path / NAME)
    assert waits == [1, 2, 4]
    warned = [text for text, level in log if level == logging.WARNING]
    assert warned[0] == f'{NAME}: the server answers 500 Internal Server Error; try 2 of 4 in 1 s'


@pytest.mark.parametrize(
    ('value', 'least', 'most'),
    [
        ('7', 7, 7),
        ('3600', 60, 60),
        ('%a, %d %b %Y %H:%M:%S GMT', 25, 30),
        ('%a, %d %b %Y %H:%M:%S -0000', 25, 30),
        ('Thu, 01 Jan 1970 00:00:00 GMT', 0, 0),
        ('soon', 1, 1),
    ],
)
def test_retry_after(value, least, most, tmp_path, waits):
    value = time.strftime(value, time.gmtime(time.time() + 30))
    with Server(CONTENT, [Answer(429, {'Retry-After': value})]) as server:
        download(server.url(NAME), tmp_path / NAME)
    assert len(waits) == 1
    assert least <= waits[0] <= most


@pytest.mark.parametrize('server_knows_if_range', [True, False])
def test_second_call_continues(tmp_path, server_knows_if_range):
    good = Answer(if_range=server_knows_if_range)
    with Server(CONTENT, [Answer(cut=1000)] + [Answer(404)], good) as server:
        with pytest.raises(DownloadError, match='404'):
            download(server.url(NAME), tmp_path / NAME)
        assert left(tmp_path) == {'.part', '.part.json'}
        assert download(server.url(NAME), tmp_path / NAME).read_bytes() == CONTENT
    assert ranges(server)[2:] == ['bytes=1000-']
    assert server.requests[2]['If-Range'] == TAG
    assert left(tmp_path) == {''}


# What an earlier call left -> the part, its validator, whether the server knows If-Range and
# sends a tag, whether the hash is known, ranges asked for.
REST = f'bytes={len(CONTENT)}-'
STALE = {
    'changed file': (OTHER[:1000], '"old"', True, True, False, ['bytes=1000-']),
    'changed, no If-Range': (OTHER[:1000], '"old"', False, True, False, ['bytes=1000-', None]),
    'changed, no tag': (OTHER[:1000], '', False, False, True, ['bytes=1000-', None]),
    'no tag, no hash': (CONTENT[:1000], '', True, False, False, [None]),
    'complete': (CONTENT, TAG, True, True, True, [REST]),
    'complete, no hash': (CONTENT, TAG, True, True, False, [REST]),
    'complete, but wrong': (OTHER, TAG, True, True, True, [REST, None]),
    'complete, but changed': (OTHER, '"old"', True, True, False, [REST]),
    'complete, changed, no If-Range': (OTHER, '"old"', False, True, False, [REST, None]),
    'too long': (CONTENT + b'x', TAG, True, True, False, [f'bytes={len(CONTENT) + 1}-', None]),
    'empty': (b'', TAG, True, True, True, [None]),
}


@pytest.mark.parametrize('case', STALE)
def test_part_of_an_earlier_call(case, tmp_path):
    part, validator, if_range, etag, hash_known, asked = STALE[case]
    name = NAME if hash_known else 'model.pth'
    with Server(CONTENT, finally_=Answer(if_range=if_range, etag=etag)) as server:
        leave_part(tmp_path / name, part, server.url(name), validator)
        assert download(server.url(name), tmp_path / name).read_bytes() == CONTENT
    assert ranges(server) == asked
    assert {file.name for file in tmp_path.iterdir()} == {name, f'{name}.lock'}


@pytest.mark.parametrize('notes', ['{"url": "http://other/", "validator": "x"}', '{', '[]', '{}'])
def test_notes_of_no_use(notes, tmp_path):
    (tmp_path / 'model.pth.part').write_bytes(OTHER[:1000])
    (tmp_path / 'model.pth.part.json').write_text(notes)
    with Server(CONTENT) as server:
        assert download(server.url(), tmp_path / 'model.pth').read_bytes() == CONTENT
    assert ranges(server) == [None]


def test_wrong_file_is_not_downloaded_twice(tmp_path):
    with Server(OTHER) as server:
        leave_part(tmp_path / NAME, CONTENT[:1000], server.url(NAME))  # changed, so of no use
        with pytest.raises(DownloadError, match='SHA-256 is'):
            download(server.url(NAME), tmp_path / NAME)
    assert ranges(server) == ['bytes=1000-']


def test_weak_tag_does_not_vouch_for_bytes(tmp_path):
    date = 'Sat, 21 Nov 2026 11:54:00 GMT'
    answer = Answer(cut=9, headers={'ETag': 'W/"1"', 'Last-Modified': date})
    with Server(CONTENT, [answer]) as server:
        download(server.url(NAME), tmp_path / NAME)
    assert server.requests[1]['If-Range'] == date


def test_part_never_lies_under_the_notes_of_another_version(tmp_path):
    leave_part(tmp_path / NAME, OTHER, 'http://host/x', '"old"')
    module._Job('http://host/x', tmp_path / NAME, '', None).start_again('"new"')
    assert left(tmp_path) == {'.part.json'}


def test_page_does_not_spoil_the_part(tmp_path):
    page = Answer(headers={'Content-Type': 'text/html'}, body=PAGE)
    with Server(CONTENT, [Answer(cut=1000), page]) as server:
        with pytest.raises(DownloadError, match='web page'):
            download(server.url(NAME), tmp_path / NAME)
        download(server.url(NAME), tmp_path / NAME)
    assert ranges(server) == [None, 'bytes=1000-', 'bytes=1000-']


@pytest.mark.parametrize('sha256', [SHA, SHA.upper()])
def test_full_hash_is_checked(sha256, tmp_path):
    with Server(CONTENT) as server:
        download(server.url(), tmp_path / 'model.pth', sha256)
        (tmp_path / 'model.pth').unlink()
        server.files = OTHER
        with pytest.raises(DownloadError, match=f'expected {SHA}'):
            download(server.url(), tmp_path / 'model.pth', sha256)
    assert not (tmp_path / 'model.pth').exists()


def test_hash_in_the_name_of_the_url_is_checked(tmp_path):
    with Server(OTHER) as server, pytest.raises(DownloadError, match=f'expected {SHA[:8]}'):
        download(server.url(NAME + '?raw=1'), tmp_path / 'model.pth')


def test_hash_in_words_only_if_unknown(tmp_path, log):
    with Server(CONTENT) as server:
        download(server.url(NAME), tmp_path / NAME)
        assert [level for _, level in log] == [logging.INFO] * 2
        assert 'Downloading http' in log[0][0]
        assert '307.2 kB' in log[1][0]
        log.clear()
        download(server.url(), tmp_path / 'model.pth')
        download(server.url(), tmp_path / 'model.pth')
    assert [level for _, level in log] == [logging.INFO, logging.WARNING]
    assert 'could not be checked' in log[1][0]
    assert SHA in log[1][0]


@pytest.mark.parametrize(
    ('name', 'found'),
    [
        ('model.pth', ''),
        ('model-0123456.pth', ''),
        ('model-01234567.pth', '01234567'),
        ('model-0123456789abcdef.pth.tar', '0123456789abcdef'),
        ('model-01234567_20220316.pth', '01234567'),
        ('model_20220316-01234567.pth', '01234567'),
        ('model-20220316.pth', ''),
        ('model-20229916.pth', '20229916'),
        ('model-01234567-small.pth', ''),
        ('model-0123456g.pth', ''),
    ],
)
def test_short_hash(name, found):
    assert module.short_hash(name) == found


def test_size_is_checked(tmp_path):
    with Server(CONTENT) as server:
        with pytest.raises(DownloadError, match=r'the file at .* has 307200 bytes, expected 5'):
            download(server.url(), tmp_path / 'model.pth', size=5)
        server.finally_ = Answer(length=False)
        with pytest.raises(DownloadError, match='has 307200 bytes, expected 5'):
            download(server.url(), tmp_path / 'model.pth', size=5)
        server.answers = [Answer(length=False, cut=1000)]
        download(server.url(), tmp_path / 'model.pth', size=len(CONTENT))
    assert ranges(server) == [None, None, None, 'bytes=1000-']


# What is there already -> its content, sha256, size, words of the error.
EXISTING = {
    'good by its name': (NAME, CONTENT, '', None, None),
    'good by sha256': ('model.pth', CONTENT, SHA, len(CONTENT), None),
    'unknown': ('model.pth', OTHER, '', None, None),
    'bad by its name': (NAME, OTHER, '', None, 'is there, but.*SHA-256 is.*Remove it .rm '),
    'bad by sha256': ('model.pth', OTHER, SHA, None, f'expected {SHA}.*Remove it .rm '),
    'bad size': ('model.pth', OTHER, '', 5, 'expected 5.*Remove it .rm '),
    'empty': ('model.pth', b'', '', None, 'has 0 bytes'),
}


@pytest.mark.parametrize('case', EXISTING)
def test_existing_file_is_checked_without_network(case, tmp_path):
    name, content, sha256, size, words = EXISTING[case]
    path = tmp_path / name
    path.write_bytes(content)
    url = f'http://127.0.0.1:9/{name}'
    if words is None:
        assert download(url, path, sha256, size) == path
    else:
        with pytest.raises(DownloadError, match=words):
            download(url, path, sha256, size)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]  # a folder may be read-only


def test_existing_folder(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(DownloadError, match='it is a folder'):
        download('http://127.0.0.1:9/x', tmp_path / NAME)


def test_no_space_before_the_start(tmp_path, monkeypatch):
    free = SimpleNamespace(free=300_000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: free)
    with Server(CONTENT) as server:
        with pytest.raises(DownloadError, match=r'307\.2 kB are to come, 300\.0 kB.*Make room'):
            download(server.url(NAME), tmp_path / NAME)
        assert left(tmp_path) == set()
        leave_part(tmp_path / NAME, CONTENT[:10_000], server.url(NAME))
        download(server.url(NAME), tmp_path / NAME)
        leave_part(tmp_path / 'other.pth', OTHER[:10_000], server.url(), '"old"')
        download(server.url(), tmp_path / 'other.pth')  # room is made by what is of no use


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='only Linux has a full device')
def test_no_space_while_writing(tmp_path, monkeypatch):
    def full(self, mode='r', *args, **kwargs):
        return open('/dev/full' if mode == 'wb' else self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, 'open', full)
    with Server(CONTENT) as server, pytest.raises(DownloadError, match=r'no space.*Make room'):
        download(server.url(NAME), tmp_path / NAME)
    assert not (tmp_path / NAME).exists()


def test_disk_fails_at_the_end(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Server(CONTENT) as server:
        with monkeypatch.context() as context:
            context.setattr(os, 'fsync', fail)
            with pytest.raises(DownloadError, match=r'no space.*307\.2 kB have arrived'):
                download(server.url(NAME), tmp_path / NAME)
        assert left(tmp_path) == {'.part', '.part.json'}
        download(server.url(NAME), tmp_path / NAME)
    assert ranges(server) == [None, REST]


def test_read_only_folder(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    with monkeypatch.context() as context:
        context.setattr(Path, 'mkdir', fail)
        with pytest.raises(DownloadError, match=r'Read-only file system.*MMHRFORMER_CACHE'):
            download('http://127.0.0.1:9/x', tmp_path / 'new' / NAME)
    (tmp_path / 'file').touch()
    with pytest.raises(DownloadError, match=r'cannot keep .*MMHRFORMER_CACHE'):
        download('http://127.0.0.1:9/x', tmp_path / 'file' / NAME)


def test_no_network(tmp_path, waits):
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))  # and never listens
        url = f'http://127.0.0.1:{unused.getsockname()[1]}/x'
        words = (
            f'no connection to 127.0.0.1.*refused.*{re.escape(str(tmp_path))} as {NAME}.*network'
        )
        with pytest.raises(DownloadError, match=words):
            download(url, tmp_path / NAME)
    assert waits == [1, 2, 4]
    assert left(tmp_path) == set()


def test_unknown_certificate(tmp_path, monkeypatch, waits):
    def fail(*args, **kwargs):
        raise URLError(ssl.SSLCertVerificationError('self-signed'))

    monkeypatch.setattr('urllib.request.OpenerDirector.open', fail)
    with pytest.raises(DownloadError, match=r'self-signed.*SSL_CERT_FILE'):
        download('https://127.0.0.1/x', tmp_path / NAME)
    assert not waits


def test_redirect_from_https_to_http():
    request = SimpleNamespace(type='https', full_url='https://host/x')
    with pytest.raises(DownloadError, match='leads to http://host/x'):
        module._Redirects().redirect_request(request, io.BytesIO(), 302, '', {}, 'http://host/x')


@pytest.mark.parametrize(
    ('url', 'words'),
    [
        ('file:///tmp/model.pth', 'give its path'),
        ('ftp://host/model.pth', 'has to be http'),
        ('/tmp/model.pth', 'has to be http'),
        ('mmhrformer://model.pth', 'has to be http'),
        ('https:///model.pth', 'has to be http'),
        ('http://host:port/model.pth', 'has to be http'),
        ('http://[host/model.pth', 'has to be http'),
        ('http://host/my model.pth', '%XX'),
        ('http://host/mödel.pth', '%XX'),
        ('http://host/model.pth\n', '%XX'),
    ],
)
def test_bad_url(url, words, tmp_path):
    with pytest.raises(DownloadError, match=words):
        download(url, tmp_path / NAME)


@pytest.mark.parametrize('sha256', ['abc', 'sha256:' + SHA, SHA[:8]])
def test_bad_sha256(sha256, tmp_path):
    with pytest.raises(ValueError, match=f'sha256={sha256!r}'):
        download('http://127.0.0.1:9/x', tmp_path / NAME, sha256)


def test_bar_on_a_terminal(tmp_path, monkeypatch, log):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr('sys.stderr', terminal)
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('COLUMNS', '120')
    with Server(CONTENT) as server:
        download(server.url(NAME), tmp_path / NAME)
    assert NAME in terminal.getvalue()
    assert '307.2/307.2 kB' in terminal.getvalue()
    assert not log


def in_process(url: str, path: Path) -> multiprocessing.Process:
    """A process that downloads; forked, as importing torch again would take seconds."""
    process = multiprocessing.get_context('fork').Process(
        target=download, args=(url, path), daemon=True
    )
    process.start()
    return process


def until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.01)


def test_processes_wait_for_one_another(tmp_path):
    with Server(CONTENT, [Answer(cut=1000, hold=True)]) as server:
        first = in_process(server.url(NAME), tmp_path / NAME)
        until(lambda: len(server.requests) == 1)
        others = [in_process(server.url(NAME), tmp_path / NAME) for _ in range(2)]
        time.sleep(0.2)
        assert len(server.requests) == 1
        server.closed.set()  # cuts the first answer
        for process in [first, *others]:
            process.join(10)
            assert process.exitcode == 0
    assert ranges(server) == [None, 'bytes=1000-']
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_killed_process_blocks_nobody(tmp_path):
    with Server(CONTENT, [Answer(cut=200_000, hold=True)]) as server:
        first = in_process(server.url(NAME), tmp_path / NAME)
        part = tmp_path / f'{NAME}.part'
        until(lambda: part.exists() and part.stat().st_size)
        first.kill()
        first.join()
        assert not (tmp_path / NAME).exists()
        download(server.url(NAME), tmp_path / NAME)
    assert ranges(server)[1].startswith('bytes=')


def test_file_system_without_locks(tmp_path, monkeypatch, log):
    def fail(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, 'flock', fail)
    with Server(CONTENT) as server:
        download(server.url(NAME), tmp_path / NAME)
    assert 'without locks' in log[0][0]


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert module.cache_folder() == tmp_path / 'hub/checkpoints/mmhrformer'
    monkeypatch.setenv('MMHRFORMER_CACHE', '~/here')
    assert module.cache_folder() == Path.home() / 'here'

"""Files that are there completely or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from mmhrformer.utils.files import whole_file, write_atomically


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    write_atomically(path, b'old')

    def fsync(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(OSError, match='No space left'):
        write_atomically(path, b'new')
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['file']


def test_an_error_on_the_way_leaves_nothing(tmp_path):
    def write_half():
        with whole_file(tmp_path / 'file') as file:
            file.write(b'half')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert os.listdir(tmp_path) == []


def test_the_name_changes_hands_after_the_content_is_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    steps = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda file: (steps.append('sync'), sync(file)))
    monkeypatch.setattr(os, 'replace', lambda *names: (steps.append('rename'), replace(*names)))
    write_atomically(path, b'new')
    assert steps == ['sync', 'rename', 'sync']
    assert path.read_bytes() == b'new'

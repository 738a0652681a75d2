"""What torch may build of mmengine's checkpoints."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmhrformer.engine.safe_globals import allow_mmengine_checkpoints, history_method

HAS_LIST = hasattr(torch.serialization, 'add_safe_globals')


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def renamed(data: bytes, old: bytes, new: bytes) -> bytes:
    """The same file, as another NumPy would have written it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, 'w') as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(old, new))
    return out.getvalue()


def read(data: bytes) -> dict:
    return torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)


def log() -> dict:
    history = HistoryBuffer([0.5, 0.25], [1, 1])
    return dict(loss=history, best=np.float64(0.75), steps=np.arange(3), names=np.array(['a', 'b']))


@pytest.mark.skipif(not HAS_LIST, reason='this torch has no list of what it may build')
@pytest.mark.parametrize('core', ['numpy.core', 'numpy._core'])
def test_logs_are_read_whatever_numpy_wrote_them(core):
    data = saved(log())
    other = {'numpy.core': b'numpy._core', 'numpy._core': b'numpy.core'}[core]
    got = read(renamed(data, other + b'.multiarray', core.encode() + b'.multiarray'))
    assert got['loss'].mean() == 0.375
    assert got['best'] == 0.75
    np.testing.assert_array_equal(got['steps'], [0, 1, 2])
    np.testing.assert_array_equal(got['names'], ['a', 'b'])


class Evil:
    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


class Worse:
    def __reduce__(self):
        return eval, ('1 + 1',)


@pytest.mark.skipif(not HAS_LIST, reason='this torch has no list of what it may build')
@pytest.mark.parametrize('thing', [Evil(), Worse()])
def test_anything_else_is_refused(thing):
    with pytest.raises(Exception, match=r'is not needed to train on|Unsupported global'):
        read(saved(dict(thing=thing)))


def test_history_method_reaches_nothing_else():
    assert history_method(HistoryBuffer, 'max') is HistoryBuffer.max
    for owner, name in ((HistoryBuffer, '__init__'), (np, 'load'), ('', 'format')):
        with pytest.raises(ValueError, match=f'asks for {name!r}'):
            history_method(owner, name)
    assert allow_mmengine_checkpoints() is HAS_LIST

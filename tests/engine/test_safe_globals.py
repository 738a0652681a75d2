"""The parts of mmengine's checkpoints that torch may build."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim import MultiStepLR, OneCycleLR, OneCycleParamScheduler, OptimWrapper

from mmhrformer.engine.safe_globals import allow_mmengine_checkpoints, stored_method

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
    with pytest.raises(Exception, match=r'is not needed to resume|Unsupported global'):
        read(saved(dict(thing=thing)))


@pytest.mark.skipif(not HAS_LIST, reason='this torch has no list of what it may build')
def test_stock_schedulers_and_metainfo_are_read():
    optimizer = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
    schedulers = (
        MultiStepLR(optimizer, milestones=[1, 2, 2]),
        OneCycleLR(optimizer, eta_max=0.1, total_steps=9),
        OneCycleLR(optimizer, eta_max=0.1, total_steps=9, anneal_strategy='linear'),
    )
    states = [scheduler.state_dict() for scheduler in schedulers]
    metainfo = dict(source=ConfigDict(year=2021), joints=frozenset({3}), weights=np.ones(2))
    got = read(saved(dict(states=states, metainfo=metainfo)))
    assert got['states'] == states
    assert got['metainfo']['source'].year == 2021
    assert got['metainfo']['joints'] == {3}


def test_stored_methods_are_known_ones():
    assert stored_method(HistoryBuffer, 'max') is HistoryBuffer.max
    for owner, name in (
        (HistoryBuffer, '__init__'),
        (OneCycleParamScheduler, 'step'),
        (np, 'load'),
        ('', 'format'),
        ([], 'append'),
    ):
        with pytest.raises(ValueError, match=f'asks for {name!r}'):
            stored_method(owner, name)
    assert allow_mmengine_checkpoints() is HAS_LIST

"""What holds for all tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from mmengine.registry import DefaultScope

FRAMEWORKS = ('mmpretrain', 'mmpose', 'mmseg', 'mmdet')
ABSENT = {name for name in FRAMEWORKS if importlib.util.find_spec(name) is None}


def needs_absent(err: BaseException | None) -> str:
    """The framework that is not installed and that an error comes from, or an empty string."""
    while err is not None:
        if isinstance(err, ModuleNotFoundError) and (name := str(err.name).split('.')[0]) in ABSENT:
            return name
        err = err.__cause__ or err.__context__
    return ''


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip what needs a framework that the environment has not, such as that of test-modern."""
    try:
        return (yield)
    except Exception as err:
        if name := needs_absent(err):
            pytest.skip(f'needs {name}')
        raise


@pytest.fixture(autouse=True)
def no_scope_is_left() -> Iterator[None]:
    """Forget the scope of a runner that a test has built: others would look names up there."""
    before = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)

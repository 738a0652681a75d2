"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import triton_on_cpu  # noqa: F401
from mmengine.registry import DefaultScope
from needs import needed_by

import mmhrformer


def skip_without_framework() -> Iterator[None]:
    """Skip what fails for want of a framework that the environment has not."""
    try:
        return (yield)
    except Exception as err:
        if name := needed_by(err, ours=set(mmhrformer.__all__)):
            pytest.skip(f'needs {name}')
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Fixtures may need a framework, too."""
    return (yield from skip_without_framework())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Run a test."""
    return (yield from skip_without_framework())


def forget_scopes() -> Iterator[None]:
    """Forget the scope of a runner that was built: others would look names up there."""
    before = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


@pytest.fixture(autouse=True)
def no_scope_of_a_test_is_left() -> Iterator[None]:
    """See :func:`forget_scopes`."""
    yield from forget_scopes()


@pytest.fixture(autouse=True, scope='module')
def no_scope_of_a_fixture_is_left() -> Iterator[None]:
    """See :func:`forget_scopes`; fixtures of a whole module build runners, too."""
    yield from forget_scopes()

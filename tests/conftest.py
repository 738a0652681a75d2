"""Settings and fixtures of all tests."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import triton_on_cpu  # noqa: F401
from mmengine.registry import DefaultScope
from mmengine.utils import ManagerMixin
from mmengine.visualization import Visualizer
from needs import needed_by

import mmhrformer


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a command say how many skips belong to its environment."""
    parser.addoption('--skips', type=int, help='fail unless so many tests are skipped')


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Compare the number of skips; a process that xdist started knows only its own."""
    expected = session.config.option.skips
    if expected is None or hasattr(session.config, 'workerinput'):
        return
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    skipped = len(reporter.stats.get('skipped', []))
    if skipped != expected:
        reporter.write_line(f'\n{skipped} tests were skipped, --skips says {expected}', red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_finish() -> None:
    """Collections of garbage need not scan what was imported, which took 0.25 s each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With ``--dist loadfile``, run the recipes of the journeys, which are long, apart."""
    from recipes import RECIPES
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition('::')
            recipes = [r for r in RECIPES if name.endswith((f'[{r}]', f'-{r}]'))]
            return f'{file} {recipes}' if file.endswith('test_journeys.py') else file

    return Scheduling(config, log) if config.getvalue('dist') == 'loadfile' else None


def skip_without_framework(item: pytest.Item) -> Iterator[None]:
    """Skip what fails for want of a framework, where the test says that it may: ``may_need``."""
    try:
        return (yield)
    except Exception as err:
        declared = {name for mark in item.iter_markers('may_need') for name in mark.args}
        if name := needed_by(err, declared, ours=set(mmhrformer.__all__)):
            pytest.skip(f'needs {name}')
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Fixtures may need a framework, too."""
    return (yield from skip_without_framework(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Run a test."""
    return (yield from skip_without_framework(item))


@pytest.fixture(autouse=True, scope='session')
def configs_are_not_laid_out() -> Iterator[None]:
    """Runners format their config, which takes seconds; here only those of end-to-end tests do."""
    with pytest.MonkeyPatch.context() as patch:
        # Not in the maintained forks.
        layout = 'mmengine.config.config.FormatCode'
        patch.setattr(layout, lambda text, **style: (text, True), raising=False)
        yield


@pytest.fixture(autouse=True)
def equal_random_numbers() -> None:
    """Each test draws the same numbers in each run, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which modules are searched before all others."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def managers(base: type = ManagerMixin) -> Iterator[type]:
    """Default scopes and visualizers, which mmengine shares by name."""
    for kind in base.__subclasses__():
        if issubclass(kind, (DefaultScope, Visualizer)):
            yield kind
            yield from managers(kind)


def restore() -> Iterator[None]:
    """Restore what runners and scripts change in this process.

    Runners register scopes and visualizers, which the next one with the same name would use; a
    script puts its folder in front of the search path, like one that Python starts.
    """
    before, path = {kind: dict(kind._instance_dict) for kind in managers()}, list(sys.path)
    yield
    sys.path[:] = path
    for kind in managers():
        kind._instance_dict.clear()
        kind._instance_dict.update(before.get(kind, {}))


@pytest.fixture(autouse=True)
def tests_leave_nothing() -> Iterator[None]:
    """See :func:`restore`."""
    yield from restore()


@pytest.fixture(autouse=True, scope='module')
def fixtures_leave_nothing() -> Iterator[None]:
    """See :func:`restore`; fixtures of a whole module build runners, too."""
    yield from restore()

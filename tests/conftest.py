"""Settings and fixtures of all tests."""

from __future__ import annotations

import gc
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.utils import ManagerMixin
from mmengine.visualization import Visualizer
from needs import needed_by
from places import ENV, ROOT

import mmhrformer

# Hypothesis writes the constants of the code when tests are collected, by default into .hypothesis.
os.environ['HYPOTHESIS_STORAGE_DIRECTORY'] = str(ROOT / '.pytest_cache' / 'hypothesis')


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a command say how many skips belong to its environment."""
    parser.addoption('--skips', type=int, help='fail unless so many tests are skipped')


def untracked() -> set[str]:
    """What git does not track in the checkout, without environments and caches of tools."""
    command = ['git', 'status', '--porcelain', '--ignored']
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    names = {line[3:] for line in listed.splitlines() if line[:2] in ('??', '!!')}
    return {name for name in names if not re.match(r'\.venv|.*cache(__)?/$', name)}


def pytest_sessionstart(session: pytest.Session) -> None:
    """With ``--skips``, as in the Makefile, remember which files the checkout has."""
    if session.config.option.skips is not None:
        session.untracked = untracked()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """With ``--skips``, compare the number and the files, and say it after all else is printed.

    Processes of xdist do not know them.
    """
    yield
    expected = session.config.option.skips
    if expected is None or hasattr(session.config, 'workerinput'):
        return
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    skipped = len(reporter.stats.get('skipped', []))
    faults = [f'{name} is new in the checkout' for name in untracked() - session.untracked]
    if skipped != expected:
        faults.append(f'{skipped} tests were skipped, --skips says {expected}')
    for fault in faults:
        reporter.write_line(fault, red=True)
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


@pytest.fixture(scope='session')
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the temporary files of this run, which the processes of xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder


@pytest.fixture(autouse=True, scope='session')
def temporary_files(shared_folder: Path) -> Iterator[None]:
    """Killed processes leave files: pytest removes them with its own, three runs later."""
    folder = shared_folder / 't'  # short, since paths of sockets have at most 108 characters
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, 'tempdir', str(folder))
        patch.setenv('TMPDIR', str(folder))
        patch.setitem(ENV, 'TMPDIR', str(folder))
        yield


def seed() -> None:
    """Let tests and fixtures draw the same numbers in each run, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def equal_random_numbers() -> None:
    """See :func:`seed`."""
    seed()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """Fixtures of modules and sessions are set up before the one above."""
    if fixturedef.scope != 'function':
        seed()


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

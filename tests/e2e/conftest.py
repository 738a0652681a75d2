"""Shared fixtures of the end-to-end tests: demo data, a working folder, an installed wheel."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from filelock import FileLock
from places import ROOT, Place, run


@pytest.fixture(scope='session')
def demo_data(shared_folder) -> Path:
    # Tests run in two processes; the second finds what the first has written.
    data = shared_folder / 'data'
    with FileLock(shared_folder / 'data.lock'):
        run([sys.executable, 'demo/demo_data.py', '--out', str(data / 'demo')], ROOT)
    return data


@pytest.fixture(scope='session')
def copy(demo_data, tmp_path_factory) -> Path:
    """A copy of the checkout with the demo data, for what writes into the checkout it is run in."""
    folder = tmp_path_factory.mktemp('copy')
    for name in ('configs', 'demo', 'mmhrformer', 'tools'):
        shutil.copytree(ROOT / name, folder / name)
    (folder / 'data').symlink_to(demo_data)
    return folder


@pytest.fixture(scope='session')
def clone(demo_data, tmp_path_factory) -> Place:
    """The checkout, installed in place."""
    cwd = tmp_path_factory.mktemp('clone')
    (cwd / 'data').symlink_to(demo_data)
    return Place(sys.executable, cwd)


@pytest.fixture(scope='session')
def wheel(demo_data, tmp_path_factory) -> Place:
    """A wheel of the checkout in an environment of its own, on top of this one's packages."""
    folder = tmp_path_factory.mktemp('wheel')
    build = [sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel', '-d', str(folder)]
    run(build, ROOT)
    venv.create(folder / 'env', with_pip=False)
    python = str(folder / 'env/bin/python')
    (site,) = (folder / 'env').glob('lib/python*/site-packages')
    (site / 'base.pth').write_text(sysconfig.get_path('purelib'))
    (built,) = folder.glob('*.whl')
    install = ['-m', 'pip', 'install', '--no-deps', '--target', str(site), str(built)]
    run([sys.executable, *install], folder)
    (folder / 'data').symlink_to(demo_data)
    place = Place(python, folder)
    where = place.where('mmhrformer')
    assert str(site) in where
    return place

"""What the end-to-end tests share: demo data, a place to run, an installed wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')


def run(command: list[str], cwd: Path) -> str:
    """Run a command, fail the test with its output if it fails, return the output."""
    done = subprocess.run(
        command, cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f'{" ".join(command)}\n{done.stdout[-5000:]}'
    return done.stdout


@dataclass(frozen=True)
class Place:
    """An installation to test: its Python, and a working folder with the demo data."""

    python: str
    cwd: Path

    def run(self, *args: str) -> str:
        return run([self.python, *args], self.cwd)


@pytest.fixture(scope='session')
def demo_data() -> Path:
    run([sys.executable, 'tools/demo_data.py'], ROOT)
    return ROOT / 'data'


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
    where = place.run('-c', 'import mmhrformer; print(mmhrformer.__file__)')
    assert str(site) in where
    return place

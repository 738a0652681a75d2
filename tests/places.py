"""Places to run commands in: the checkout, or an environment with an installed wheel."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
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

    def where(self, package: str) -> str:
        """The file that ``import`` would run, found without waiting for it."""
        code = f'from importlib.util import find_spec; print(find_spec({package!r}).origin)'
        return self.run('-c', code)

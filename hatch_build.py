"""The files of the wheel that depend on their names: those that ``tools/benchmark.py`` runs."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BenchmarkFiles(BuildHookInterface):
    """Adds ``benchmarks/benchmark*.py``; the table of forced files in pyproject.toml has no globs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        for file in Path(self.root, 'benchmarks').glob('benchmark*.py'):
            build_data['force_include'][str(file)] = f'mmhrformer/.mim/benchmarks/{file.name}'

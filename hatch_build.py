"""Build hook of the wheel: the files that ``tools/benchmark.py`` runs."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BenchmarkFiles(BuildHookInterface):
    """Adds ``benchmarks/benchmark*.py``: ``force-include`` in pyproject.toml takes no globs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        for file in Path(self.root, 'benchmarks').glob('benchmark*.py'):
            build_data['force_include'][str(file)] = f'mmhrformer/.mim/benchmarks/{file.name}'

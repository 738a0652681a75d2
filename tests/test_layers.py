"""Modules import only those in lower layers, so there are no import cycles.

Imports inside functions count, and so do those that Python adds: of a package before what is in it.
Imports that only type checkers see do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest
from places import ROOT

# From bottom to top. The checkpoints are below the models, whose load hook translates names.
LAYERS = (
    ('version', 'utils'),
    ('registry',),
    ('configs',),
    ('ops',),
    ('checkpoints',),
    ('models',),
    ('datasets',),
    ('deploy',),
    ('engine',),
    ('hub',),
    ('inferencers',),
    ('analysis',),
    ('cli', '__main__'),
    ('apis',),
    ('',),  # the package itself: public names, which nothing in it imports
)
MAX_LINES = 40  # of a function, with its docstring


def read_imports(root: Path) -> dict[str, set[str]]:
    """The modules of a package, by dotted name, and which of them each imports."""
    files = {}
    for file in root.rglob('*.py'):
        name = '.'.join(file.relative_to(root.parent).with_suffix('').parts)
        files[name.removesuffix('.__init__')] = file
    imports = {module: set() for module in files}
    for module, file in files.items():
        package = module if file.stem == '__init__' else module.rpartition('.')[0]
        for name in names_imported(ast.parse(file.read_text()), package):
            found = [parent for parent in with_parents(name) if parent in files]
            around = set(with_parents(module))  # the packages that Python has begun to import
            imports[module] |= {*found[:1], *(set(found) - around)}
    return imports


def names_imported(node: ast.AST, package: str) -> Iterator[str]:
    """The names in the imports below a node, of modules or of what is in modules."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = resolve_name('.' * child.level + (child.module or ''), package)
            yield from (f'{base}.{alias.name}' for alias in child.names)
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == 'TYPE_CHECKING'):
            yield from names_imported(child, package)


def with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition('.')[0]


def part_of(module: str) -> str:
    """The entry of a module in the table of layers."""
    return f'{module}.'.split('.')[1]


IMPORTS = read_imports(ROOT / 'mmhrformer')


def test_no_import_goes_round():
    TopologicalSorter(IMPORTS).prepare()


def test_every_module_has_one_layer():
    listed = [part for layer in LAYERS for part in layer]
    assert sorted(listed) == sorted({part_of(module) for module in IMPORTS})


def test_imports_point_down():
    level = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    wrong = [
        f'{module} -> {other}'
        for module, others in IMPORTS.items()
        for other in others
        if level[part_of(other)] > level[part_of(module)]
    ]
    assert not wrong


def test_functions_fit_on_a_screen():
    """Except for Triton kernels and their callers."""
    long = [
        f'{file.relative_to(ROOT)}: {node.name}, {lines} lines'
        for folder in ('mmhrformer', 'tools', 'benchmarks', 'demo', 'dev')
        for file in (ROOT / folder).rglob('*.py')
        if not file.name.startswith('triton_')
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and (lines := node.end_lineno - node.lineno + 1) > MAX_LINES
    ]
    assert not long


@pytest.mark.parametrize(
    'text',
    [
        'import p.above.b',
        'from p.above import b',
        'from p.above.b import name',
        'from .above import b',
        'from .above.b import name',
        'from . import above',
        'from . import name',
        'def f():\n    from .above import other',
        'try:\n    import p.above\nexcept ImportError:\n    pass',
    ],
)
def test_all_forms_of_import_are_seen(text, tmp_path):
    """Otherwise the tests above would pass for the wrong reason."""
    root = tmp_path / 'p'
    (root / 'above').mkdir(parents=True)
    (root / '__init__.py').write_text('from . import above')
    (root / 'above/__init__.py').write_text('from .b import name')
    (root / 'above/b.py').write_text('from .. import a')
    (root / 'a.py').write_text(f'from typing import TYPE_CHECKING\n{text}')
    with pytest.raises(CycleError):
        TopologicalSorter(read_imports(root)).prepare()
    hidden = text.replace('\n', '\n    ')
    (root / 'a.py').write_text(f'if TYPE_CHECKING:\n    {hidden}')
    TopologicalSorter(read_imports(root)).prepare()

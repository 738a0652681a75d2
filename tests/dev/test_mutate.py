"""dev/mutate.py: whether its mutations fit the code, and what it says of a tiny project."""

from __future__ import annotations

import subprocess

import mutate as tool
import pytest
from mutations import MODERN, MUTATIONS, Mutation

CODE = 'def half(x):\n    return x / 2\n\n\ndef double(x):\n    return x * 2\n'
TESTS = """
import time
from code_under_test import double, half

def test_half():
    assert half(4) == 2

def test_fails_anyway():
    assert double(1) == 3

def test_hangs():
    time.sleep(300)
"""


def mutation(name: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(name, 'code_under_test.py', tests or ('test_code.py::test_half',), old, new)


def test_mutations_fit_the_code():
    """If this fails, the code has moved: correct dev/mutations.py."""
    assert tool.check([*MUTATIONS, *MODERN], tool.ROOT) == []
    assert len(MUTATIONS) >= 80


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / 'code_under_test.py').write_text(CODE)
    (tmp_path / 'test_code.py').write_text(TESTS)
    subprocess.run(['git', 'init', '-q', tmp_path], check=True)
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    return tmp_path


def test_mutations_that_do_not_fit_are_named(project):
    wrong = [
        mutation('gone', 'x / 3', 'x'),
        mutation('twice', 'return x', 'return 1'),
        mutation('nothing', 'x / 2', 'x / 2'),
        mutation('no Python', 'x / 2', 'x /'),
        mutation('no test', 'x / 2', 'x', 'test_code.py::test_third'),
        mutation('no test', 'x / 2', 'x', 'test_other.py'),
    ]
    told = tool.check(wrong, project)
    for start in ('gone', 'twice', 'nothing'):
        assert sum(line.startswith(f'{start}: ') for line in told) == 1, told
    assert 'no Python: ' in '\n'.join(told)
    assert [line for line in told if line.startswith('no test')] == [
        'no test: the name is not unique',
        'no test: there is no test_code.py::test_third',
        'no test: there is no test_other.py',
    ]
    assert len(told) == 7
    assert tool.check([mutation('fits', 'x / 2', 'x // 2')], project) == []


@pytest.mark.slow
def test_a_project(project, monkeypatch, capsys):
    """The outcome of each mutation is reported; the checkout is not changed."""
    mutations = [
        mutation('sign', 'x / 2', '-x / 2'),
        mutation('equal here', 'x / 2', 'x // 2'),
        mutation('proves nothing', 'x * 2', 'x * 4', 'test_code.py::test_fails_anyway'),
    ]
    monkeypatch.setattr(tool, 'MUTATIONS', mutations)
    monkeypatch.setattr(tool, 'PRELOADED', ['pytest'])
    assert tool.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith('caught ') for line in lines[:3]) == 2, lines
    assert lines[3:] == [
        'SURVIVED: equal here  ',
        'NOT RUN: proves nothing  test_code.py::test_fails_anyway',
        '1 of 3 mutations caught, 33.3%',
    ]
    assert (project / 'code_under_test.py').read_text() == CODE
    assert tool.main(['--only', 'sign', '--jobs', '1']) == 0
    assert tool.main(['--ids']) == tool.main(['--check']) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        *(one.name for one in mutations),
        '3 mutations apply',
    ]
    hangs = mutation('hangs', 'x * 2', 'x + 2', 'test_code.py::test_hangs')
    assert tool.try_mutation(hangs, project, limit=1).word == 'TIMED OUT'
    assert (project / 'code_under_test.py').read_text() == CODE
    with pytest.raises(SystemExit):
        tool.main(['--only', 'nothing has this name'])
    assert 'see --ids' in capsys.readouterr().err

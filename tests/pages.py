"""The documentation as data: pages, their fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

from mmhrformer.cli.main import main

DOCS = ROOT / 'docs'
PAGES = sorted(DOCS.glob('*.md'))
OWN_DATA = DOCS / 'own_data.md'  # with configs for own data
FENCE = re.compile(r'^(?P<fence>```+)(?P<kind>.*)\n(?P<code>(?:.*\n)*?)(?P=fence)$', re.M)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, kind: str) -> Iterator[tuple[int, str]]:
    """Code of a kind in a page, and the number of lines before each."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match['kind'] == kind:
            yield text.count('\n', 0, match.start('code')), match['code']


def configs_of(page: Path) -> dict[str, str]:
    """The complete configs of a page, by the path that their first line names."""
    found = {}
    for _, code in blocks(page, 'python'):
        if first := re.match(r'# (\S+\.py)\n', code):
            found[first[1]] = code
    return found


def commands_of(page: Path) -> list[list[str]]:
    """The shell commands of a page as words, without comments."""
    text = ''.join(code for _, code in blocks(page, 'bash')).replace('\\\n', ' ')
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def write_clone(folder: Path) -> Path:
    """A folder with our configs, and those of own data where the page says; return the configs."""
    configs = shutil.copytree(ROOT / 'configs', folder / 'configs')
    (configs / 'my').mkdir()
    for path, text in configs_of(OWN_DATA).items():
        (folder / path).write_text(text)
    return configs


def call(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``python tools/NAME.py ...`` or ``python -m mmhrformer ...`` in this process."""
    assert words[0] == 'python'
    monkeypatch.setenv('LOCAL_RANK', '0')  # stock tools set it
    monkeypatch.setattr(sys, 'path', list(sys.path))
    if words[1:3] == ['-m', 'mmhrformer']:
        monkeypatch.setattr(sys, 'argv', words[2:])
        assert main(words[3:]) == 0
    else:
        monkeypatch.setattr(sys, 'argv', words[1:])
        runpy.run_path(str(ROOT / words[1]), run_name='__main__')

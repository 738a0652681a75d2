"""Pages that messages name: files of the clone, or addresses where there is no clone."""

from __future__ import annotations

import re
from importlib import metadata

import pytest
from places import ROOT

from mmhrformer.utils import addresses

PAGE = 'docs/datasets.md#cityscapes'


@pytest.fixture
def no_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(addresses, 'ROOT', tmp_path)


def urls() -> dict[str, str]:
    """The URLs of pyproject.toml."""
    text = re.search(r'(?s)\[project\.urls\]\n(.*?)\n\n', (ROOT / 'pyproject.toml').read_text())[1]
    return dict(re.findall(r'(\w+) = "(.*)"', text))


def test_a_clone_has_the_page():
    assert addresses.find_page(PAGE) == PAGE


@pytest.mark.usefixtures('no_clone')
def test_a_wheel_names_the_address_of_its_metadata(monkeypatch):
    wheel = metadata.metadata('pip')  # has addresses of the same form
    del wheel['Project-URL']
    for label, url in urls().items():
        wheel['Project-URL'] = f'{label}, {url}'
    monkeypatch.setattr(metadata, 'metadata', {'mmhrformer': wheel}.__getitem__)
    assert addresses.repository() == urls()['Repository']
    assert addresses.find_page(PAGE) == f'{urls()["Repository"]}/blob/main/{PAGE}'


@pytest.mark.usefixtures('no_clone')
def test_without_metadata_the_name_stays(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, 'metadata', missing)
    assert addresses.repository() == ''
    assert addresses.find_page(PAGE) == PAGE


def test_the_address_stands_in_one_place():
    repository = urls()['Repository']
    assert all(url.startswith(repository) for url in urls().values())
    texts = [
        path
        for pattern in ('*.md', '*.cff', '*.py', 'docs/*.md', 'mmhrformer/**/*.py', '.github/**/*')
        for path in ROOT.glob(pattern)
        if path.is_file()
    ]
    assert len(texts) > 100
    examples = ROOT / 'mmhrformer/utils/addresses.py'
    assert [path for path in texts if repository in path.read_text()] == [examples]


def test_every_page_that_the_code_names_exists():
    """Paths to docs in messages; comments and docstrings contain them as well."""
    named = {
        match
        for file in (*ROOT.glob('mmhrformer/**/*.py'), *ROOT.glob('tools/*.py'))
        for match in re.findall(r'\bdocs/\w+\.md', file.read_text())
    }
    assert 'docs/datasets.md' in named
    assert all((ROOT / page).is_file() for page in named)

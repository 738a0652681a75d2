"""URLs of pages and files of the repository, for messages: a wheel does not contain them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def repository() -> str:
    """URL of the repository, from pyproject.toml; empty if the package is not installed.

    Examples:
        >>> repository()  # doctest: +SKIP
        'https://github.com/mmhrformer/mmhrformer'
    """
    try:
        urls = metadata.metadata('mmhrformer').get_all('Project-URL') or ()
    except metadata.PackageNotFoundError:
        return ''
    return dict(url.split(', ', 1) for url in urls).get('Repository', '')


def find_page(name: str) -> str:
    """Find a page of the documentation.

    Args:
        name (str): Path in the repository, optionally with an anchor.

    Returns:
        str: The path itself if the file exists, as in a clone; its URL otherwise.

    Examples:
        >>> find_page('docs/datasets.md#cityscapes')  # doctest: +SKIP
        'docs/datasets.md#cityscapes'
    """
    address = repository()
    if (ROOT / name.partition('#')[0]).is_file() or not address:
        return name
    return f'{address}/blob/main/{name}'

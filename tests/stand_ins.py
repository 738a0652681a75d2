"""Stand-ins for packages: modules that raise what real ones raise, and the metadata of pip."""

from __future__ import annotations

from pathlib import Path


def write_module(site: Path, name: str, content: str = '') -> None:
    folder = site.joinpath(*name.split('.'))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / '__init__.py').write_text(content)


def write_metadata(site: Path, name: str, version: str) -> None:
    folder = site / f'{name.replace("-", "_")}-{version}.dist-info'
    folder.mkdir()
    (folder / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')

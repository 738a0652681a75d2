"""The tutorial runs from its first cell to its last, and is stored with what comes of it."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbclient import NotebookClient
from places import ENV, ROOT

pytestmark = pytest.mark.e2e

TUTORIAL = ROOT / 'docs/tutorial.ipynb'


def outputs_of(notebook: nbformat.NotebookNode) -> list:
    return [out for cell in notebook.cells for out in cell.get('outputs', [])]


def kinds_of_outputs(notebook: nbformat.NotebookNode) -> list[set]:
    """Of each cell; parts of one text may come together or apart."""
    return [{out.output_type for out in cell.get('outputs', [])} for cell in notebook.cells]


def test_tutorial_runs(copy, monkeypatch, tmp_path):
    notebook = nbformat.read(TUTORIAL, as_version=4)
    stored = kinds_of_outputs(notebook)
    assert TUTORIAL.stat().st_size < 300_000
    assert str(ROOT) not in TUTORIAL.read_text()
    monkeypatch.setenv('PYTHONPATH', str(copy))
    for name in ('OMP_NUM_THREADS', 'PYTHONWARNINGS'):
        monkeypatch.setenv(name, ENV[name])
    resources = dict(metadata=dict(path=str(tmp_path)))
    client = NotebookClient(notebook, timeout=600, kernel_name='python3', resources=resources)
    client.execute()  # raises the error of a cell
    outputs = outputs_of(notebook)
    assert kinds_of_outputs(notebook) == stored
    text = ''.join(out.text for out in outputs if out.output_type == 'stream')
    assert '(1, 18, 107, 160)' in text  # the finest stream of the photograph
    assert float(re.search(r'top-1 accuracy: ([\d.]+) %', text)[1]) > 50
    assert re.search(r'mmhrformer \d+ used, 0 missing', text)
    assert sum('image/png' in out.get('data', {}) for out in outputs) == 3

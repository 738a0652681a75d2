"""benchmarks/gpu_check.py: a dry run, and what becomes of jobs that fail."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from needs import needs
from places import ROOT, run

pytestmark = needs('mmpose', 'mmpretrain', 'mmseg')
SCRIPT = ROOT / 'benchmarks/gpu_check.py'


@pytest.fixture(scope='module')
def tool():
    """The modules of the tool."""
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / 'benchmarks'), str(ROOT / 'tools')]
    names = ('check', 'sections', 'table')
    yield SimpleNamespace(**{name: importlib.import_module(f'gpu_{name}') for name in names})
    sys.path[:] = before


def test_dry_run(tool, tmp_path):
    sections = ['env', 'infer', 'train']
    out = ['--out', str(tmp_path), '--sections', *sections]
    text = run([sys.executable, str(SCRIPT), '--dry', '--archs', 'tiny', *out], ROOT)
    (file,) = tmp_path.glob('*-cpu.json')
    data = json.loads(file.read_text())
    assert {row['section'] for row in data['rows']} == {*sections, 'run'}
    assert not [row for row in data['rows'] if row.get('error') or row.get('code')], text
    times = [row for row in data['rows'] if 'ms' in row]
    batches = {'infer batch 2': 2, 'infer batch 1': 1, 'train': 2}
    for name, batch in batches.items():
        rows = [row for row in times if row['table'] == name]
        assert {row['base'].split('-')[0] for row in rows} == {'ours', 'mmpose', 'vit'}
        assert {row['how'] for row in rows} == {'eager', 'graph'}
        assert {row['batch'] for row in rows} == {batch}
        assert all(row['images_s'] == pytest.approx(1e3 * batch / row['ms'], 0.01) for row in rows)
    differences = [row['differs'] for row in data['rows'] if 'differs' in row]
    assert len(differences) == 16
    assert max(differences) < 0.05
    text = tool.table.render(data)
    assert '| HRFormer-T, mmpose |' in text
    assert 'Failed' not in text


def start(tool, folder, run, seconds=60.0):
    """A report and a job."""
    report = tool.check.Report(folder / 'all.json', dict(card='none'))
    job = tool.check.Job('some job', 'env', run, seconds)
    tool.check.follow([tool.check.Child(job, folder, time.time() + seconds)], report)
    return json.loads((folder / 'all.json').read_text())['rows']


def crash(emit):
    emit(first=1, odd=float('nan'))
    os.kill(os.getpid(), signal.SIGKILL)


def fail(emit):
    emit(first=1)
    raise ValueError('no such thing')


def hang(emit):
    emit(first=1)
    time.sleep(60)


@pytest.mark.parametrize(
    ('job', 'code', 'error'), [(crash, -9, ''), (fail, 1, 'no such thing'), (hang, 'timed out', '')]
)
def test_a_job_that_fails_keeps_what_it_had(tool, tmp_path, job, code, error):
    row, verdict = start(tool, tmp_path, job, 1.0 if job is hang else 60.0)
    assert (row['table'], row['first']) == ('some job', 1)
    assert row.get('odd', 'NaN') == 'NaN'
    assert verdict['code'] == code
    assert error in verdict['error']
    assert 'some job' in tool.sections.UNFINISHED
    tool.sections.UNFINISHED.clear()


def test_ratios_are_of_the_same_rounds(tool):
    rows = [
        dict(base='ours', arch='small', backend='kernels', how='graph', rounds=[1.0, 2.0, 4.0]),
        dict(base='ours', arch='small', backend='kernels', how='eager', rounds=[9.0, 9.0, 9.0]),
        dict(base='mmpose-nchw', arch='small', backend='', how='graph', rounds=[3.0, 4.0, 8.0]),
        dict(base='vit-b', arch='', backend='', how='compiled', rounds=[5.0, 5.0, 5.0]),
    ]
    rows = [dict(row, ms=sorted(row['rounds'])[1], images_s=10.0) for row in rows]
    table = tool.table.times_table(rows)
    assert '| HRFormer-S, Triton | 9.00 | 2.00 |  | 10 |  | 2.00 | 2.50 |' in table


def test_examples(tool):
    assert doctest.testmod(tool.sections).attempted == 1
    assert doctest.testmod(tool.sections).failed == 0


def test_without_a_gpu_it_says_so(tool, monkeypatch):
    monkeypatch.setattr(tool.check.shutil, 'which', lambda name: None)
    with pytest.raises(SystemExit, match='--dry runs on the CPU'):
        tool.check.card_name(dry=False)

"""benchmarks/gpu_check.py: a dry run, and what becomes of jobs that fail."""

from __future__ import annotations

import doctest
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from needs import needs
from places import ROOT, run
from torch import nn

pytestmark = needs('mmpose', 'mmpretrain', 'mmseg')
SCRIPT = ROOT / 'benchmarks/gpu_check.py'


@pytest.fixture(scope='module')
def tool():
    """The modules of the tool."""
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / 'benchmarks')]
    names = ('check', 'sections', 'sweep', 'table')
    yield SimpleNamespace(**{name: importlib.import_module(f'gpu_{name}') for name in names})
    sys.path[:] = before


@pytest.mark.slow
def test_dry_run(tool, tmp_path):
    sections = ['env', 'infer', 'train', 'latency']
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
        assert len({(row['base'], row['backend'], row['how']) for row in rows}) == len(rows)
        assert {row['base'].split('-')[0] for row in rows} == {'ours', 'mmpose', 'vit'}
        hows = {'eager', 'graph', 'hook'} if name == 'train' else {'eager', 'graph'}
        assert {row['how'] for row in rows} == hows
        assert all(len(row['rounds']) == 2 for row in rows)
        assert {row['batch'] for row in rows} == {batch}
        for row in rows:  # rounded to one decimal, which matters on a busy machine
            expected = pytest.approx(1e3 * batch / row['ms'], rel=0.01, abs=0.06)
            assert row['images_s'] == expected
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


def stop_in_the_second_round(emit):
    for rounds in ([1.0], [1.0, 2.0]):
        for how in ('eager', 'graph'):
            emit(base='ours', how=how, rounds=rounds)
            if len(rounds) == 2:
                os.kill(os.getpid(), signal.SIGKILL)


def test_rounds_before_a_crash_are_kept(tool, tmp_path):
    first, second, verdict = start(tool, tmp_path, stop_in_the_second_round)
    assert (first['how'], first['rounds']) == ('eager', [1.0, 2.0])
    assert (second['how'], second['rounds']) == ('graph', [1.0])
    assert verdict['code'] == -9
    tool.sections.UNFINISHED.clear()


def test_a_candidate_that_fails_leaves_the_others_their_turns(tool, monkeypatch):
    calls = []

    def fails_later():
        calls.append(1)
        if len(calls) > 2:  # in the second round, as a dry run has one call before the first
            raise RuntimeError('out of memory')

    candidates = [tool.sections.Candidate(name) for name in ('ours', 'vit-s')]
    table = tool.sections.Table('infer', 'pose', 'infer', (64, 64), 2, candidates)
    steps = zip(candidates, (fails_later, lambda: None))
    monkeypatch.setattr(tool.sections, 'ready', lambda *args: steps)
    rows = []
    settings = tool.sections.Settings(dry=True, archs=())
    tool.sections.time_table(table, settings, lambda **row: rows.append(row))
    rounds = [(row['base'], len(row['rounds'])) for row in rows if 'rounds' in row]
    assert rounds == [('ours', 1), ('vit-s', 1), ('vit-s', 2)]
    assert [row['error'] for row in rows if 'error' in row] == ['RuntimeError: out of memory']


@pytest.mark.parametrize('trains', [False, True])
def test_a_captured_step_keeps_its_network(tool, monkeypatch, trains):
    """A graph reads weights and images by their addresses, whoever owns the memory."""
    for name in ('CUDAGraph', 'Stream', 'current_stream', 'graph', 'stream'):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    module = nn.Linear(2, 2)
    images = torch.ones(1, 2)
    alive = weakref.ref(module), weakref.ref(images)
    if trains:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        entrant = SimpleNamespace(network=module, make_optimizer=int, optimizer=optimizer)
        step = SimpleNamespace(
            entrant=entrant, backward=lambda m=module, x=images: m(x).sum().backward()
        )
        replay = tool.sections.captured_training(step, '', None, 'cuda')
        del optimizer, entrant, step
    else:
        replay = tool.sections.capture(lambda m=module, x=images: m(x), None, 'cuda')
    del module, images
    gc.collect()
    assert None not in [ref() for ref in alive]
    replay()
    del replay
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_outcomes_are_counted_in_the_log_of_stopped_tests(tool, tmp_path):
    (tmp_path / 'test_some.py').write_text(
        'import os, pytest\n'
        '@pytest.mark.parametrize("x", ["a b", "c"])\n'
        'def test_first(x): assert x == "c"\n'
        'def test_second(): pytest.skip("none (of it) here")\n'
        'def test_third(): os.kill(os.getpid(), 9)\n'
    )
    command = [sys.executable, '-m', 'pytest', '-v', '-p', 'no:cacheprovider', '.']
    log = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    found = tool.sections.outcomes(log)
    failures = found.pop('failures')
    assert found == dict(failed=1, passed=1, skipped=1, unfinished=True)
    assert failures == ['test_some.py::test_first[a b]']


def test_options_that_leave_memory_out_are_not_timed(tool):
    sums = dict(
        right=lambda: torch.ones(3), partial=lambda: torch.empty(3), wrong=lambda: -torch.ones(3)
    )
    chosen = []
    sweep = tool.sweep.Sweep(
        'sum', 'S', 3, list(sums), chosen.append, lambda: sums[chosen[-1]](), lambda: torch.ones(3)
    )
    rows = []
    steps = tool.sweep.prepare(sweep, 2, lambda repeat: repeat, lambda **row: rows.append(row))
    assert list(steps) == ['right', 'torch']
    assert [row['option'] for row in rows] == ['partial', 'wrong']
    assert 'differs from the first option' in rows[0]['error']
    assert not torch.are_deterministic_algorithms_enabled()


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
    assert '| HRFormer-S, Triton | 9.00 | 2.00 |  | 10 | 2.00 | 2.50 |' in table


@pytest.mark.parametrize('file', sorted((ROOT / 'benchmarks/results').glob('*.json')), ids=str)
def test_published_results_are_rendered(tool, file):
    data = json.loads(file.read_text())
    text = tool.table.render(data)
    assert all(f'## {row["table"]}' in text for row in data['rows'])
    assert data['method'] in text
    assert data['incomplete'] in text
    for row in data['rows']:
        assert not ('ms' in row and row['ms'] <= 0)
    assert file.stat().st_size < 200_000
    assert 'Failed' not in text


def test_what_was_not_timed_has_a_line(tool):
    row = dict(base='ours', arch='small', how='eager')
    rows = [dict(row, backend='new form', peak_mb=7), dict(row, backend='cuda', peak_mb=8)]
    rows.append(dict(row, backend='cuda', how='new way', ms=2.0, images_s=3.0))
    assert tool.table.times_table(rows).splitlines()[2:] == [
        '| HRFormer-S, new form |  |  | 7 |',
        '| HRFormer-S, torch | 2.00 | 3 | 8 |',
    ]


def test_examples(tool):
    assert doctest.testmod(tool.sections).attempted == 2
    assert doctest.testmod(tool.sections).failed == 0


def test_without_a_gpu_it_says_so(tool, monkeypatch):
    monkeypatch.setattr(tool.check.shutil, 'which', lambda name: None)
    with pytest.raises(SystemExit, match='--dry runs on the CPU'):
        tool.check.card_name(dry=False)

"""dev/support.py: what it writes down, and the matrix in the documentation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import support as module

VERSIONS = {
    'python': '3.12.1',
    'torch': '2.13.0',
    'numpy': '2.4.6',
    'mmengine': '0.10.7',
    'mmcv-lite': '2.2.0',
}


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The tool in an environment without frameworks, with records of its own."""
    monkeypatch.setattr(module, 'RECORDS', tmp_path / 'records')
    monkeypatch.setattr(module, 'find_versions', lambda: dict(VERSIONS))
    return module


def test_page_is_written_from_the_records():
    page = module.PAGE.read_text()
    assert module.read_records()
    assert module.put_table(page, module.make_table(module.read_records())) == page


def test_rows_are_those_of_the_records():
    parts = {
        'core': dict(passed=5, skipped=2, failed=0),
        'cls': dict(metric='top-1 accuracy', value=98.54),
        'pose': dict(absent='mmpose'),
        'seg': dict(error='KeyError: 1'),
    }
    newer = dict(versions={**VERSIONS, 'python': '3.9.1', 'torch': '2.14.0'}, parts={})
    table = module.make_table([newer, dict(versions=VERSIONS, parts=parts)]).splitlines()
    assert table[2] == (
        '| 3.12.1 | 2.13.0 | 2.4.6 | mmengine 0.10.7, mmcv-lite 2.2.0 | 5 passed, 2 skipped | '
        'top-1 accuracy 98.5 % | mmpose not installed | fails: `KeyError: 1` |'
    )
    assert table[3].startswith('| 3.9.1 | 2.14.0 |')
    assert table[3].count('not run') == 4
    assert module.cell(dict(passed=5, skipped=2, failed=1)) == '5 passed, 2 skipped, 1 failed'


def test_versions_are_found():
    found = module.find_versions()
    assert found['python'] == '.'.join(map(str, sys.version_info[:3]))
    assert '+' not in found['torch']
    assert module.name_of_record(found).endswith('.json')


@pytest.mark.parametrize('second', [{}, {'mmcv': '2.1.0', 'mmcv-lite': '2.2.0'}])
def test_environments_that_are_no_whole_are_refused(second):
    versions = {'python': '3.12.1', 'torch': '2.13.0', 'numpy': '2.4.6', **second}
    with pytest.raises(ValueError, match=r'mmcv is provided by .*mmhrformer env'):
        module.name_of_record(versions)


def test_parts_are_added_to_the_record_of_the_environment(tool, monkeypatch):
    monkeypatch.setattr(tool, 'run_core', lambda processes: dict(passed=processes))
    path = tool.run(['core', 'pose'], processes=2)
    assert path.name == 'py3.12-torch2.13.0-numpy2.4.6-mmcv-lite2.2.0.json'
    tool.run(['seg'], processes=2)
    parts = {'core': {'passed': 2}, 'pose': {'absent': 'mmpose'}, 'seg': {'absent': 'mmseg'}}
    assert json.loads(path.read_text()) == dict(versions=VERSIONS, parts=parts)
    monkeypatch.setitem(VERSIONS, 'mmengine', '0.10.8')
    tool.run(['seg'], processes=2)  # what older packages did says nothing about these
    assert list(json.loads(path.read_text())['parts']) == ['seg']


@pytest.fixture
def steps(tool, monkeypatch):
    """The calls of the stock tools; what they print can be set."""
    calls, says = [], {'resumed': 'resumed epoch: 1, iter: 10'}

    def run_tool(name, args, log, threads):
        calls.append((name, args[1:]))
        log.write_text(says.get(log.stem, ''))

    monkeypatch.setattr(tool, 'run_tool', run_tool)
    monkeypatch.setattr(tool, 'find_latest_checkpoint', lambda folder: str(folder / 'a.pth'))
    monkeypatch.setattr(tool, 'read_metric', lambda folder, metric: 0.875)
    monkeypatch.setattr(tool.demo_data, 'TASKS', dict.fromkeys(('cls', 'pose', 'seg'), str))
    return calls, says


def test_a_task_is_stopped_resumed_and_tested(tool, steps, tmp_path):
    calls, _ = steps
    assert tool.run_task('pose', tmp_path / 'pose') == dict(metric='AP', value=87.5)
    work, test = (str(tmp_path / 'pose' / name) for name in ('train', 'test'))
    assert calls == [
        ('train', ['--work-dir', work, '--cfg-options', 'train_cfg.max_epochs=1']),
        ('train', ['--work-dir', work, '--resume']),
        ('test', [f'{work}/a.pth', '--work-dir', test]),
    ]


def test_what_fails_is_written_down(tool, steps, monkeypatch):
    _, says = steps
    says['resumed'] = 'from the beginning'
    monkeypatch.setitem(VERSIONS, 'mmpretrain', '1.2.0')
    record = json.loads(tool.run(['cls'], processes=1).read_text())
    assert record['parts']['cls']['error'].endswith('resumed.log shows no resuming')


def test_tests_are_counted(tool, monkeypatch):
    def run(command, cwd, env):
        (report,) = [part for part in command if part.startswith('--junitxml=')]
        suite = '<testsuite errors="1" failures="2" skipped="3" tests="10" />'
        Path(report.split('=')[1]).write_text(f'<testsuites>{suite}</testsuites>')

    monkeypatch.setattr(subprocess, 'run', run)
    assert tool.run_core(processes=2) == dict(passed=4, skipped=3, failed=3)

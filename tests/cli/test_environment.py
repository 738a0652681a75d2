"""``python -m mmhrformer env``: what works, and how to fix what does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from places import ROOT, run
from stand_ins import write_metadata, write_module

from mmhrformer.cli import environment
from mmhrformer.ops import dispatch
from mmhrformer.utils import install_hints

# Feature -> module that cannot be imported, error, what else the feature imports.
BROKEN = {
    'mmcv operators': ('mmcv.ops', ModuleNotFoundError("No module named 'mmcv._ext'"), ['mmcv']),
    'classification': (
        'mmpretrain.datasets', ModuleNotFoundError("No module named 'transformers.onnx'"),
        ['mmpretrain', 'mmpretrain.models'],
    ),
    'pose': (
        'xtcocotools', ValueError('numpy.dtype size changed, may indicate incompatibility'),
        ['mmdet', 'mmpose', 'mmpose.models', 'mmpose.datasets', 'mmpose.evaluation'],
    ),
    'segmentation': ('mmseg', ModuleNotFoundError("No module named 'ftfy'"), []),
    'detector boxes': ('mmdet', AssertionError('MMCV==2.2.0 is used but incompatible.'), []),
    'export': ('onnxruntime', RuntimeError('Numpy is not available'), ['onnx']),
    'safetensors': (
        'safetensors', ImportError('lib.so:\n"numpy.core.multiarray failed to import"'), [],
    ),
    'mim': ('mim', ModuleNotFoundError("No module named 'pkg_resources'"), []),
    'package configs': (
        'pkg_resources', ModuleNotFoundError("No module named 'pkg_resources'"), [],
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_package_is_reported_with_the_fix(site, name):
    module, error, others = BROKEN[name]
    for other in others:
        write_module(site, other)
    write_module(site, module, f'raise {error!r}')
    (result,) = environment.try_features({name: environment.FEATURES[name]})
    assert not result['works']
    assert str(error).partition('\n')[0] in result['says']
    assert result['fix'] == install_hints.suggest_fix(f'{module} {error}') != ''


def test_the_command_explains_a_broken_core(site):
    """`python -m mmhrformer env` imports the package first, whose error ends with the fix."""
    write_module(site, 'mmcv', 'raise ImportError("no module named mmcv._ext")')
    write_metadata(site, 'mmcv', '2.1.0')
    command = [sys.executable, '-m', 'mmhrformer', 'env']
    env = dict(os.environ, PYTHONPATH=f'{site}{os.pathsep}{ROOT}')
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('ImportError: mmhrformer needs torch, NumPy, mmengine and mmcv')
    assert re.search('Fix: .*pip install ', last)  # of what, depends on what is installed
    assert 'mmcv 2.1.0' in last.partition('Installed: ')[2]


@pytest.mark.parametrize('missing', ['mmpretrain', 'mmpose', 'mmseg', 'mmdet', 'onnx', 'mim'])
def test_what_is_missing_is_named_with_the_way_to_install_it(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    (result,) = environment.try_features({'part': f'json {missing}.parts {missing}'})
    assert (result['works'], result['says']) == (False, f'not installed: {missing}')
    assert 'pip install' in result['fix']
    assert result['fix'] == install_hints.suggest_fix(f"No module named '{missing}'")


CHECKS = """
import os, signal, sys

def good():
    print('noise')
    return 'as expected'

def bad():
    print('noise', file=sys.stderr)
    raise ValueError('x\\ny')

def crash():
    os.kill(os.getpid(), signal.SIGSEGV)

def process():
    return os.getpid()
"""


def test_every_failure_is_told_and_the_others_are_tried(site):
    write_module(site, 'checks', CHECKS)
    names = ['process', 'good', 'bad', 'crash', 'process', 'good']
    features = {f'{i} {name}': f'json checks:{name}' for i, name in enumerate(names)}
    results = environment.try_features({**features, 'quiet': 'json', 'last': 'checks:process'})
    assert [result['name'] for result in results] == [*features, 'quiet', 'last']
    works = [result['works'] for result in results]
    assert works == [True, True, False, False, True, True, True, True]
    first, good, bad, crash, second, again, quiet, last = [result['says'] for result in results]
    assert (good, bad, crash) == ('as expected', 'ValueError: x', 'killed by signal 11')
    assert (again, quiet) == ('as expected', '')
    assert first != second == last  # one process until something fails


def test_operators_are_found_where_they_are():
    from mmcv.utils import ext_loader

    assert environment.has_operators() == ext_loader.check_ops_exist()


@pytest.mark.parametrize(('check', 'status'), [('parts:fine', 0), ('parts:wrong', 1)])
def test_the_status_tells_whether_the_core_works(monkeypatch, capsys, site, check, status):
    write_metadata(site, 'onedl-mmengine', '0.10.12')
    write_module(site, 'parts', 'def fine():\n    return "fine"')
    monkeypatch.setattr(environment, 'FEATURES', {'core': check, 'other': 'no_such_module'})
    assert environment.main(['--json']) == status
    report = json.loads(capsys.readouterr().out)
    assert [part['works'] for part in report['features']] == [status == 0, False]
    assert report['packages']['onedl-mmengine'] == '0.10.12'
    assert environment.main([]) == status
    said = capsys.readouterr().out
    assert f'torch                  {report["packages"]["torch"]}' in said
    assert ('core                   yes  fine' in said) == (status == 0)
    assert 'pip uninstall -y mmengine onedl-mmengine' in said


def test_forms_of_the_operators_are_reported(monkeypatch):
    monkeypatch.setenv('MMHRFORMER_OPS', 'reference')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    (result,) = environment.try_features({'operators': environment.FEATURES['operators']})
    assert (result['works'], result['says']) == (True, 'reference: MMHRFORMER_OPS')
    monkeypatch.setenv('MMHRFORMER_OPS', 'fast')
    with pytest.raises(ValueError, match=r"'fast' is not a backend .* choose one of"):
        dispatch.describe()


@pytest.mark.parametrize(
    ('device', 'reason', 'said'),
    [
        ('cpu', 'it runs on GPUs', 'cpu'),
        ('cuda', 'Triton is not installed: ...', 'cuda: Triton is not installed: ...'),
        ('cuda', '', 'kernels (Triton 3.6.0)'),
    ],
)
def test_forms_are_those_that_are_used(monkeypatch, device, reason, said):
    x = SimpleNamespace(device=torch.device(device), is_cuda=device == 'cuda')
    monkeypatch.delenv('MMHRFORMER_OPS', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: x.is_cuda)
    monkeypatch.setattr(
        torch, 'empty', lambda *size, device: x if device == x.device.type else None
    )
    monkeypatch.setattr(dispatch, 'why_not', lambda device: reason)
    monkeypatch.setitem(sys.modules, 'triton', SimpleNamespace(__version__='3.6.0'))
    assert dispatch.describe() == said


@pytest.mark.e2e
def test_everything_works_in_the_environment_of_the_tests():
    report = json.loads(run([sys.executable, '-m', 'mmhrformer', 'env', '--json'], ROOT))
    parts = {part['name']: part for part in report['features']}
    needed = (
        'core',
        'operators',
        'package configs',
        'mmcv operators',
        'classification',
        'pose',
        'segmentation',
        'detector boxes',
    )
    assert [name for name in needed if not parts[name]['works']] == []
    assert report['mmcv_has_operators']
    assert 'GPU' in parts['core']['says']

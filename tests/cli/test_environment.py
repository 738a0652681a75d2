"""``python -m mmhrformer env``: broken installations are recognized, with the cure.

They are made of stand-ins: modules that raise what the real ones raise, and the metadata that pip
leaves behind.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module, metadata
from types import SimpleNamespace

import pytest
import torch
from places import ROOT, run

from mmhrformer.cli import environment
from mmhrformer.cli.environment import Feature
from mmhrformer.ops import dispatch
from mmhrformer.utils import install_hints

UNDEFINED = '/site-packages/mmcv/_ext.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN2at4_op'
SIZE_CHANGED = (
    'numpy.dtype size changed, may indicate binary incompatibility. '
    'Expected 96 from C header, got 88 from PyObject'
)
# What an import says in a broken installation: module, error, feature, words of the cure.
BROKEN = {
    'mmcv built for another torch': (
        'mmcv.ops', ImportError(UNDEFINED), 'mmcv operators',
        ['built for another torch', '--no-cache-dir', 'mmcv==2.1.0'],
    ),
    'mmcv-lite': (
        'mmcv.ops', ModuleNotFoundError("No module named 'mmcv._ext'"), 'mmcv operators',
        ['no operators', 'MMCV_WITH_OPS=1'],
    ),
    'mmcv too new for mmdet': (
        'mmdet', AssertionError('MMCV==2.2.0 is used but incompatible. Please install mmcv>=2.0.0'),
        'detector boxes', ['2.0.1 to 2.1.0 only', 'mmcv==2.1.0', 'maintained forks'],
    ),
    'mmengine too new for mmpretrain': (
        'mmpretrain', AssertionError('MMEngine==1.0.0 is used but incompatible.'),
        'classification', ["'mmengine>=0.10.3,<1.0'"],
    ),
    'xtcocotools built for NumPy 1': (
        'xtcocotools', ValueError(SIZE_CHANGED), 'pose',
        ['xtcocotools was built for NumPy 1', '--no-binary xtcocotools', '"numpy<2"'],
    ),
    'onnx built for NumPy 1': (
        'onnx', AttributeError('_ARRAY_API not found'), 'export', ['"numpy<2"'],
    ),
    'mim without pkg_resources': (
        'mim', ModuleNotFoundError("No module named 'pkg_resources'"), 'mim', ['"setuptools<81"'],
    ),
    'transformers too new for mmpretrain': (
        'mmpretrain', ImportError(
            "cannot import name 'apply_chunking_to_forward' from 'transformers.modeling_utils' "
            '(/site-packages/transformers/modeling_utils.py)'
        ),
        'classification', ["'transformers>=4.28,<4.56'", 'pip uninstall -y transformers'],
    ),
    'transformers without a module that mmpretrain imports': (
        'mmpretrain', ModuleNotFoundError("No module named 'transformers.onnx'"),
        'classification', ["'transformers>=4.28,<4.56'"],
    ),
    'torch built for NumPy 1': (
        'onnx', RuntimeError('Numpy is not available'), 'export', ['"numpy<2"', 'torch 2.3'],
    ),
    'OpenCV built for NumPy 1': (
        'onnx', ImportError('numpy.core.multiarray failed to import'), 'export', ['"numpy<2"'],
    ),
    'mmengine older than its yapf': (
        'mmpretrain', TypeError("FormatCode() got an unexpected keyword argument 'verify'"),
        'classification', ["'mmengine>=0.10.3'"],
    ),
    'torchvision built for another torch': (
        'mmpretrain', RuntimeError('operator torchvision::nms does not exist'),
        'classification', ['torchvision was built for another torch'],
    ),
    'mmpretrain without what it does not declare': (
        'mmpretrain', ModuleNotFoundError("No module named 'importlib_metadata'"),
        'classification', ['pip install importlib_metadata'],
    ),
    'mmseg without what it does not declare': (
        'mmseg', ModuleNotFoundError("No module named 'ftfy'"), 'segmentation',
        ['pip install ftfy regex'],
    ),
}  # fmt: skip
# Enough of each package for the code of its feature to run.
STAND_INS = {
    'classification': ['mmpretrain', 'mmpretrain.models', 'mmpretrain.datasets'],
    'pose': ['mmdet', 'mmpose', 'mmpose.models', 'mmpose.datasets', 'mmpose.evaluation'],
    'mmcv operators': ['mmcv'],
    'export': ['onnxruntime'],
}


def write_module(root, name: str, content: str = '') -> None:
    folder = root.joinpath(*name.split('.'))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / '__init__.py').write_text(content)


def install(root, name: str, version: str) -> None:
    """Leave what pip leaves."""
    folder = root / f'{name.replace("-", "_")}-{version}.dist-info'
    folder.mkdir()
    (folder / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')


def feature(name: str) -> Feature:
    (found,) = [feature for feature in environment.FEATURES if feature.name == name]
    return found


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that is searched before all others."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_package_is_recognized(site, name):
    module, error, part, words = BROKEN[name]
    for stand_in in STAND_INS.get(part, ()):
        write_module(site, stand_in)
    if part == 'pose':
        write_module(site, 'mmpose.evaluation', f'import {module}')
    write_module(site, module, f'raise {error!r}')
    (result,) = environment.try_features([feature(part)])
    assert not result.works
    assert str(error) in result.says
    for word in words:
        assert word in result.cure


@pytest.mark.parametrize('name', BROKEN)
def test_the_same_is_said_where_the_import_fails(site, name):
    module, error, _, words = BROKEN[name]
    module = f'broken_{module.replace(".", "_")}'
    write_module(site, module, f'raise {error!r}')
    with pytest.raises(type(error)) as caught:
        import_module(module)
    for word in words:
        assert word in install_hints.explain(caught.value)


def test_packages_of_both_families_overwrite_each_other(site):
    install(site, 'mmengine', '0.10.7')
    install(site, 'onedl-mmengine', '0.10.12')
    ((problem, cure),) = install_hints.overwritten(install_hints.installed())
    assert 'mmengine 0.10.7 and onedl-mmengine 0.10.12 are both installed' in problem
    assert 'pip uninstall -y mmengine onedl-mmengine' in cure
    assert 'pip install --no-deps onedl-mmengine==0.10.12' in cure
    with pytest.warns(RuntimeWarning, match='pip uninstall -y mmengine onedl-mmengine'):
        install_hints.check_core()
    assert cure in install_hints.explain(ImportError("cannot import name 'Registry'"))


def test_a_user_without_a_home_is_told_what_to_set():
    """As in a container that is run by a number."""
    for words in ('Could not determine home directory.', 'could not determine the home directory'):
        assert 'HOME=/tmp' in install_hints.explain(RuntimeError(words))


@pytest.mark.parametrize('name', ['torch', 'mmengine.registry', 'mmcv.cnn'])
def test_a_core_that_cannot_be_imported_is_an_error_with_the_cure(monkeypatch, name):
    package = name.partition('.')[0]
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(install_hints, 'cure_of', lambda said: f'the cure of {package}')
    with pytest.raises(ImportError, match=rf'{name} halted.* To mend it: the cure of {package}'):
        install_hints.check_core()


def test_the_command_explains_a_broken_core(site):
    """`python -m mmhrformer env` imports the package first, and ends with what mends it."""
    write_module(site, 'mmcv', 'raise ImportError("no module named mmcv._ext")')
    install(site, 'mmcv', '2.1.0')
    command = [sys.executable, '-m', 'mmhrformer', 'env']
    env = dict(os.environ, PYTHONPATH=f'{site}{os.pathsep}{ROOT}')
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('ImportError: mmhrformer is built on torch, NumPy, mmengine and mmcv')
    assert re.search('To mend it: .*pip install ', last)  # of what, depends on what is installed
    assert 'mmcv 2.1.0' in last.partition('Installed: ')[2]


def test_mmcv_beside_mmcv_lite_is_recognized(site):
    install(site, 'mmcv', '2.1.0')
    install(site, 'mmcv-lite', '2.1.0')
    ((problem, _),) = install_hints.overwritten(install_hints.installed())
    assert 'mmcv 2.1.0 and mmcv-lite 2.1.0' in problem


@pytest.mark.parametrize(
    ('name', 'version', 'oldest'),
    [
        ('torch', '1.13.1+cu117', '2.1'),
        ('mmcv', '1.7.2', '2.0.1'),
        ('mmpose', '0.29.0', '1.0'),
    ],
)
def test_an_old_package_is_recognized(site, name, version, oldest):
    install(site, name, version)
    ((problem, cure),) = install_hints.too_old(install_hints.installed())
    assert f'{name} {version} is too old' in problem
    assert cure == f"pip install -U '{name}>={oldest}'"


@pytest.mark.parametrize(
    ('name', 'version', 'beside', 'cure'),
    [
        ('transformers', '5.0.0', 'mmpretrain', "'transformers>=4.28,<4.56'"),
        ('setuptools', '82.0.1', 'openmim', '"setuptools<81"'),
        ('mmcv', '2.2.0', 'mmdet', 'mmcv==2.1.0'),
    ],
)
def test_a_package_that_is_too_new_is_recognized(site, name, version, beside, cure):
    install(site, name, version)
    install(site, beside, '1.2.0')
    found = install_hints.too_new(install_hints.installed())
    (said,) = [remedy for what, remedy in found if f'{version} is too new for {beside}' in what]
    assert cure in said
    assert install_hints.too_new({name: version}) == []
    assert install_hints.too_new({name: '1.0', beside: '1.2.0'}) == []


def test_a_sound_installation_has_no_problems():
    assert install_hints.problems(install_hints.installed()) == []


@pytest.mark.parametrize('module', ['mmengine', 'mmcv', 'mmpretrain', 'mmpose', 'mmseg', 'mmdet'])
def test_beside_the_forks_nothing_stock_is_advised(monkeypatch, module):
    stock = install_hints.cure_of(f"No module named '{module}'")
    assert 'mmhrformer[' in stock or 'mmdet>=3.0' in stock
    monkeypatch.setattr(install_hints, 'installed', lambda names=(): {'onedl-mmengine': '0.10.12'})
    cure = install_hints.cure_of(f"No module named '{module}'")
    assert ('pip install onedl-mm' in cure) == (module != 'mmpose')
    assert 'mmhrformer[' not in cure
    operators = install_hints.cure_of("No module named 'mmcv._ext'")
    assert '--no-binary onedl-mmcv onedl-mmcv' in operators
    assert 'mmcv==2.1.0' not in operators


def test_installed_versions_are_those_of_pip():
    found = install_hints.installed()
    assert found['torch'] == metadata.version('torch')
    assert 'onedl-mmpose' not in found


@pytest.mark.parametrize('missing', ['mmpretrain', 'mmpose', 'mmseg', 'mmdet', 'onnx', 'mim'])
def test_what_is_missing_is_named_with_the_way_to_install_it(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    wanted = Feature('part', (missing,), f'import {missing}')
    (result,) = environment.try_features([wanted])
    assert (result.works, result.says) == (False, f'not installed: {missing}')
    assert 'pip install' in result.cure
    assert result.cure == install_hints.cure_of(f"No module named '{missing}'")


def test_every_failure_is_told_and_the_others_are_tried():
    parts = [
        Feature('good', ('json',), 'says = "as expected"'),
        Feature('bad', (), 'import sys; print("noise", file=sys.stderr); raise ValueError("x")'),
        Feature('crash', (), 'import os, signal; os.kill(os.getpid(), signal.SIGSEGV)'),
        Feature('other', (), 'print("noise")'),
    ]
    results = environment.try_features(parts)
    assert [result.works for result in results] == [True, False, False, True]
    says = [result.says for result in results]
    assert says == ['as expected', 'ValueError: x', 'was ended by signal 11', '']


def test_operators_are_found_where_they_are():
    from mmcv.utils import ext_loader

    assert environment.has_operators() == ext_loader.check_ops_exist()


@pytest.mark.parametrize(('code', 'status'), [('says = "fine"', 0), ('import no_such_module', 1)])
def test_the_status_tells_whether_the_core_works(monkeypatch, capsys, site, code, status):
    install(site, 'onedl-mmengine', '0.10.12')
    parts = (Feature('core', (), code), Feature('other', ('no_such_module',), ''))
    monkeypatch.setattr(environment, 'FEATURES', parts)
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
    (forms,) = [feature for feature in environment.FEATURES if feature.name == 'operators']
    monkeypatch.setenv('MMHRFORMER_OPS', 'reference')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    (result,) = environment.try_features([forms])
    assert (result.works, result.says) == (True, 'reference: MMHRFORMER_OPS')
    monkeypatch.setenv('MMHRFORMER_OPS', 'fast')
    with pytest.raises(ValueError, match=r"'fast' is no form .* choose one of"):
        dispatch.describe()


@pytest.mark.parametrize(
    ('device', 'reason', 'said'),
    [
        ('cpu', 'it runs on GPUs', 'cpu'),
        ('cuda', 'Triton is not installed: ...', 'cuda: Triton is not installed: ...'),
        ('cuda', '', 'kernels in inference, cuda in training (Triton 3.6.0)'),
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
        'mmcv operators',
        'classification',
        'pose',
        'segmentation',
        'detector boxes',
    )
    assert [name for name in needed if not parts[name]['works']] == []
    assert report['mmcv_has_operators']
    assert 'GPU' in parts['core']['says']

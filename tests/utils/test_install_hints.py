"""Broken installations are recognized, and errors say how to fix them."""

from __future__ import annotations

import sys
from importlib import import_module, metadata

import pytest
from stand_ins import write_metadata, write_module

from mmhrformer.utils import install_hints

UNDEFINED = '/site-packages/mmcv/_ext.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN2at4_op'
SIZE_CHANGED = (
    'numpy.dtype size changed, may indicate binary incompatibility. '
    'Expected 96 from C header, got 88 from PyObject'
)
# Import errors of broken installations: module, error, words of the fix.
BROKEN = {
    'mmcv built for another torch': (
        'mmcv.ops', ImportError(UNDEFINED),
        ['built for another torch', '--no-cache-dir', 'mmcv==2.1.0'],
    ),
    'mmcv-lite': (
        'mmcv.ops', ModuleNotFoundError("No module named 'mmcv._ext'"),
        ['no operators', 'MMCV_WITH_OPS=1'],
    ),
    'mmcv too new for mmdet': (
        'mmdet', AssertionError('MMCV==2.2.0 is used but incompatible. Please install mmcv>=2.0.0'),
        ['2.0.1 to 2.1.0 only', 'mmcv==2.1.0', 'maintained forks'],
    ),
    'mmengine too new for mmpretrain': (
        'mmpretrain', AssertionError('MMEngine==1.0.0 is used but incompatible.'),
        ["'mmengine>=0.10.3,<1.0'"],
    ),
    'xtcocotools built for NumPy 1': (
        'xtcocotools', ValueError(SIZE_CHANGED),
        ['xtcocotools was built for NumPy 1', '--no-binary xtcocotools', '"numpy<2"'],
    ),
    'onnx built for NumPy 1': ('onnx', AttributeError('_ARRAY_API not found'), ['"numpy<2"']),
    'mim without pkg_resources': (
        'mim', ModuleNotFoundError("No module named 'pkg_resources'"), ['"setuptools<82"'],
    ),
    'transformers too new for mmpretrain': (
        'mmpretrain', ImportError(
            "cannot import name 'apply_chunking_to_forward' from 'transformers.modeling_utils' "
            '(/site-packages/transformers/modeling_utils.py)'
        ),
        ["'transformers>=4.28,<4.56'", 'pip uninstall -y transformers'],
    ),
    'transformers without a module that mmpretrain imports': (
        'mmpretrain', ModuleNotFoundError("No module named 'transformers.onnx'"),
        ["'transformers>=4.28,<4.56'"],
    ),
    'torch built for NumPy 1': (
        'onnx', RuntimeError('Numpy is not available'), ['"numpy<2"', 'torch 2.3'],
    ),
    'OpenCV built for NumPy 1': (
        'onnx', ImportError('numpy.core.multiarray failed to import'), ['"numpy<2"'],
    ),
    'mmengine older than its yapf': (
        'mmpretrain', TypeError("FormatCode() got an unexpected keyword argument 'verify'"),
        ["'mmengine>=0.10.3'"],
    ),
    'torchvision built for another torch': (
        'mmpretrain', RuntimeError('operator torchvision::nms does not exist'),
        ['torchvision was built for another torch'],
    ),
    'mmpretrain without an undeclared dependency': (
        'mmpretrain', ModuleNotFoundError("No module named 'importlib_metadata'"),
        ['pip install importlib_metadata'],
    ),
    'mmseg without an undeclared dependency': (
        'mmseg', ModuleNotFoundError("No module named 'ftfy'"), ['pip install ftfy regex'],
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_package_is_recognized(site, name):
    module, error, words = BROKEN[name]
    module = f'broken_{module.replace(".", "_")}'
    write_module(site, module, f'raise {error!r}')
    with pytest.raises(type(error)) as caught:
        import_module(module)
    for word in words:
        assert word in install_hints.explain(caught.value)


def test_packages_of_both_families_overwrite_each_other(site):
    write_metadata(site, 'mmengine', '0.10.7')
    write_metadata(site, 'onedl-mmengine', '0.10.12')
    ((problem, fix),) = install_hints.overwritten(install_hints.installed())
    assert 'mmengine 0.10.7 and onedl-mmengine 0.10.12 are both installed' in problem
    assert 'pip uninstall -y mmengine onedl-mmengine' in fix
    assert 'pip install --no-deps onedl-mmengine==0.10.12' in fix
    with pytest.warns(RuntimeWarning, match='pip uninstall -y mmengine onedl-mmengine'):
        install_hints.check_core()
    assert fix in install_hints.explain(ImportError("cannot import name 'Registry'"))


def test_a_user_without_a_home_is_told_what_to_set():
    """As in a container run with a numeric user id."""
    for words in ('Could not determine home directory.', 'could not determine the home directory'):
        assert 'HOME=/tmp' in install_hints.explain(RuntimeError(words))


@pytest.mark.parametrize('name', ['torch', 'mmengine.registry', 'mmcv.cnn'])
def test_a_core_that_cannot_be_imported_is_an_error_with_the_fix(monkeypatch, name):
    package = name.partition('.')[0]
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(install_hints, 'suggest_fix', lambda text: f'the fix of {package}')
    with pytest.raises(ImportError, match=rf'{name} halted.* Fix: the fix of {package}') as error:
        install_hints.check_core()
    assert (error.value.__cause__ is None) == (name == package)  # an absent package is no puzzle


def test_mmcv_beside_mmcv_lite_is_recognized(site):
    write_metadata(site, 'mmcv', '2.1.0')
    write_metadata(site, 'mmcv-lite', '2.1.0')
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
    write_metadata(site, name, version)
    found = install_hints.problems(install_hints.installed())
    (said,) = [fix for problem, fix in found if f'{name} {version} is too old' in problem]
    assert said == f"pip install -U '{name}>={oldest}'"


@pytest.mark.parametrize(
    ('name', 'version', 'beside', 'fix'),
    [
        ('transformers', '5.0.0', 'mmpretrain', "'transformers>=4.28,<4.56'"),
        ('setuptools', '82.0.1', 'openmim', '"setuptools<82"'),
        ('mmcv', '2.2.0', 'mmdet', 'mmcv==2.1.0'),
    ],
)
def test_a_package_that_is_too_new_is_recognized(site, name, version, beside, fix):
    write_metadata(site, name, version)
    write_metadata(site, beside, '1.2.0')
    found = install_hints.problems(install_hints.installed())
    (said,) = [its for problem, its in found if f'{version} is too new for {beside}' in problem]
    assert fix in said
    assert install_hints.problems({name: version}) == []
    assert install_hints.problems({name: '2.1.0', beside: '3.0.0'}) == []


def test_a_sound_installation_has_no_problems():
    assert install_hints.problems(install_hints.installed()) == []


@pytest.mark.parametrize('module', ['mmengine', 'mmcv', 'mmpretrain', 'mmpose', 'mmseg', 'mmdet'])
def test_beside_the_forks_nothing_stock_is_advised(monkeypatch, module):
    stock = install_hints.suggest_fix(f"No module named '{module}'")
    assert 'mmhrformer[' in stock or 'mmdet>=3.0' in stock
    monkeypatch.setattr(install_hints, 'installed', lambda names=(): {'onedl-mmengine': '0.10.12'})
    fix = install_hints.suggest_fix(f"No module named '{module}'")
    assert ('pip install onedl-mm' in fix) == (module != 'mmpose')
    assert 'mmhrformer[' not in fix
    operators = install_hints.suggest_fix("No module named 'mmcv._ext'")
    assert '--no-binary onedl-mmcv onedl-mmcv' in operators
    assert 'mmcv==2.1.0' not in operators


@pytest.mark.parametrize('module', ['mmengine', 'mmcv', 'mmpretrain', 'mmpose', 'mmseg', 'mmdet'])
def test_beside_stock_packages_no_fork_is_advised(monkeypatch, module):
    here = {'mmengine': '0.10.7'}
    monkeypatch.setattr(
        install_hints, 'installed', lambda names: {n: here[n] for n in names if n in here}
    )
    fix = install_hints.suggest_fix(f"No module named '{module}'")
    assert 'mmhrformer[' in fix or 'mmdet>=3.0' in fix
    assert 'onedl' not in fix
    here.clear()
    both = install_hints.suggest_fix(f"No module named '{module}'")
    assert ('onedl' in both) == (module != 'mmpose')


def test_installed_versions_are_those_of_pip():
    found = install_hints.installed()
    assert found['torch'] == metadata.version('torch')
    assert 'onedl-mmpose' not in found

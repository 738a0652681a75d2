"""The examples in docstrings run, and public classes are documented."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
from importlib import import_module

import pytest
from mmengine.logging import MMLogger
from needs import may_need

import mmhrformer
from mmhrformer import models
from mmhrformer.ops.triton_support import why_not

pytestmark = may_need('mmpose', 'mmseg')

MODULES = ['mmhrformer'] + [
    module.name for module in pkgutil.walk_packages(mmhrformer.__path__, 'mmhrformer.')
]
CLASSES = [
    name for name in dir(models) if inspect.isclass(getattr(models, name)) and name[0].isupper()
]


@pytest.fixture
def _logger():
    """A logger that already exists; otherwise its messages would count as output of an example."""
    MMLogger.get_current_instance()


@pytest.mark.usefixtures('_logger')
@pytest.mark.parametrize('name', MODULES)
def test_examples_run(name):
    if name.startswith('mmhrformer.ops.triton_') and (reason := why_not()):
        pytest.skip(reason)
    assert doctest.testmod(import_module(name)).failed == 0


def test_examples_exist():
    """Otherwise the tests above would pass for the wrong reason."""
    parser = doctest.DocTestFinder()
    examples = [e for test in parser.find(models.HRFormer) for e in test.examples]
    assert len(examples) >= 2


@pytest.mark.parametrize('name', [*CLASSES, 'OCRAuxHead', 'OCRHead'])
def test_every_argument_of_a_public_class_is_documented(name):
    kind = getattr(models, name)
    for argument in list(inspect.signature(kind).parameters.values()):
        if argument.kind is not inspect.Parameter.VAR_KEYWORD:
            assert f'{argument.name} (' in kind.__doc__, argument.name

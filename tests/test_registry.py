"""Names in configs, and what importing the package imports.

Each case runs in a process that has not imported mmhrformer before. They are forked from one that
has imported the slow libraries, so that all of them together take the time of one.
"""

from __future__ import annotations

import json
import subprocess
import sys

import golden
import mmengine.registry
import pytest
from needs import ABSENT, needs

import mmhrformer
from mmhrformer import MODELS, PARAM_SCHEDULERS

FORKS = """
import importlib, json, os, sys, traceback

import mmcv.cnn, mmengine.optim, torch

def run(code):
    reader, writer = os.pipe()
    if not os.fork():
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        try:
            assert 'mmhrformer' not in sys.modules
            exec(code, {})
            status = 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.wait()[1]), said

alone, frameworks, beside_frameworks = json.loads(sys.argv[1])
results = {name: run(code) for name, code in alone.items()}
for name in frameworks:
    importlib.import_module(name + '.models')
results.update((name, run(code)) for name, code in beside_frameworks.items())
json.dump(results, sys.stdout)
"""

ALONE = {
    'import': """
import sys
import mmhrformer
frameworks = {'mmseg', 'mmpose', 'mmpretrain', 'mmdet'} & set(sys.modules)
assert not frameworks, f'importing mmhrformer imports {frameworks}'
""",
    'no mmseg': """
import sys
sys.modules['mmseg'] = None  # what Python does here is what it does for a missing package
import mmhrformer
from mmhrformer import *
from mmengine.registry import MODELS
MODELS.build(dict(type='mmhrformer.HRFormer', arch='tiny'))
for name in ('OCRHead', 'OCRAuxHead'):
    for ask in (
        lambda: getattr(mmhrformer, name),
        lambda: getattr(mmhrformer.models, name),
        lambda: MODELS.build(dict(type=f'mmhrformer.{name}')),
    ):
        try:
            ask()
        except ImportError as error:
            assert f"'mmhrformer.{name}' needs mmsegmentation" in str(error), error
            assert "pip install 'mmhrformer[seg]'" in str(error), error
        else:
            raise AssertionError(f'no error for {name}')
""",
}

BUILD = """
from mmengine.registry import DefaultScope
from {scope}.registry import MODELS
import mmengine.registry
with DefaultScope.overwrite_default_scope({scope!r}):
    for registry in (MODELS, mmengine.registry.MODELS):
        model = registry.build(dict(type='mmhrformer.HRFormer', arch='tiny'))
        assert type(model).__module__ == 'mmhrformer.models.hrformer', type(model)
"""
SEG_HEADS = """
    options = dict(in_channels=8, channels=4, num_classes=2)
    for name in ('OCRHead', 'OCRAuxHead'):
        head = MODELS.build(dict(type=f'mmhrformer.{name}', **options))
        assert type(head).__module__ == 'mmhrformer.models.ocr_head', type(head)
"""
BARE_NAME = """
    bare = MODELS.get('HRFormer')
    assert bare.__module__.startswith('mmpose.'), bare
"""
SCHEDULER = """
import torch
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.)
options = dict(type='mmhrformer.WarmupCosineLR', warmup=2, start_factor=0.1, end=9,
               convert_to_iter_based=True)
with DefaultScope.overwrite_default_scope('mmpretrain'):
    scheduler = PARAM_SCHEDULERS.build(
        options, default_args=dict(optimizer=optimizer, epoch_length=10))
assert (scheduler.warmup, scheduler.end, scheduler.by_epoch) == (20, 90, False)
"""
BESIDE_FRAMEWORKS = {
    'mmpretrain': BUILD.format(scope='mmpretrain'),
    'mmpose': BUILD.format(scope='mmpose') + BARE_NAME,
    'mmseg': BUILD.format(scope='mmseg') + SEG_HEADS,
    'scheduler': SCHEDULER,
}
FRAMEWORKS = [name for name in ('mmpose', 'mmpretrain', 'mmseg') if name not in ABSENT]


@pytest.fixture(scope='module')
def outcomes():
    """Exit status and output of every case."""
    cases = json.dumps([ALONE, FRAMEWORKS, BESIDE_FRAMEWORKS])
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', FORKS, cases],
        cwd=golden.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_import_needs_no_framework(outcomes):
    status, said = outcomes['import']
    assert status == 0, said


def test_everything_but_the_ocr_heads_works_without_mmseg(outcomes):
    status, said = outcomes['no mmseg']
    assert status == 0, said


@pytest.mark.parametrize('framework', FRAMEWORKS)
def test_frameworks_build_the_backbone_without_custom_imports(outcomes, framework):
    """In mmpose a bare ``HRFormer`` stays mmpose's, and mmseg also builds the heads."""
    status, said = outcomes[framework]
    assert status == 0, said


@needs('mmpretrain')
def test_schedule_is_built_without_custom_imports(outcomes):
    status, said = outcomes['scheduler']
    assert status == 0, said


@pytest.mark.parametrize(
    'name',
    [
        'DWConvFFN',
        'HRFormer',
        'HRFormerBlock',
        'HRFormerFusion',
        'LocalWindowSelfAttention',
        pytest.param('OCRAuxHead', marks=needs('mmseg')),
        pytest.param('OCRHead', marks=needs('mmseg')),
        'OHEMCrossEntropyLoss',
        'WeightedCrossEntropyLoss',
    ],
)
def test_public_classes_are_registered_by_their_names(name):
    assert MODELS.get(name) is getattr(mmhrformer, name)
    assert mmengine.registry.MODELS.get(f'mmhrformer.{name}') is getattr(mmhrformer, name)


def test_registries_belong_to_the_scope_of_the_package():
    assert (MODELS.scope, PARAM_SCHEDULERS.scope) == ('mmhrformer', 'mmhrformer')
    assert PARAM_SCHEDULERS.get('WarmupCosineLR') is mmhrformer.engine.WarmupCosineLR


def test_nothing_is_registered_outside_of_the_scope():
    """Otherwise a bare name would find it, and our own registries would not."""
    mmengine.registry.HOOKS.get('mmhrformer.BFloat16PoseHook')  # imports what is registered
    for registry in vars(mmengine.registry).values():
        if isinstance(registry, mmengine.registry.Registry):
            modules = [kind.__module__ for kind in registry.module_dict.values()]
            assert not [name for name in modules if name.startswith('mmhrformer.')]


def test_unknown_names_are_ordinary_errors():
    assert MODELS.get('mmhrformer.Nonsense') is None
    with pytest.raises(AttributeError, match='Nonsense'):
        _ = mmhrformer.Nonsense

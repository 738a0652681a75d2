"""BFloat16PoseHook: pose trains in bfloat16, and in other data types nothing changes."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.optim.optimizer import amp_optimizer_wrapper
from needs import needs
from torch import nn
from training_steps import prepare

from mmhrformer.configs import find_config
from mmhrformer.engine import BFloat16PoseHook

pytestmark = needs('mmpose')
TINY = 'td-hm_hrformer-tiny_8xb32-210e_coco-256x192'


@pytest.fixture(scope='module')
def step():
    """A function that computes losses of the tiny model, perhaps in bfloat16, and the model."""
    _, model, _, batch = prepare(Config.fromfile(find_config(TINY)))
    data = model.data_preprocessor(batch, training=True)

    def losses(low: bool) -> dict:
        with torch.autocast('cpu', torch.bfloat16, enabled=low):
            return model(**data, mode='loss')

    return losses, model


@pytest.fixture
def wrapper(monkeypatch):
    """A maker of mmengine's wrappers for mixed precision, which want a GPU."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)

    def make(dtype: str | None) -> OptimWrapper:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        options = dict(optimizer=optimizer)
        return AmpOptimWrapper(dtype=dtype, **options) if dtype else OptimWrapper(**options)

    return make


def prepare_run(model: nn.Module, wrapper: OptimWrapper) -> None:
    """Calls of a run before its first iteration."""
    logger = logging.getLogger('test_bfloat16_hook')
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper, logger=logger)
    BFloat16PoseHook().before_train(runner)


def test_bfloat16_trains_without_the_accuracy(step, wrapper, caplog):
    losses, model = step
    with pytest.raises(TypeError, match='BFloat16'):
        losses(low=True)
    prepare_run(model, wrapper('bfloat16'))
    (record,) = caplog.records
    assert record.levelname == 'WARNING'
    assert record.message.startswith('acc_pose is not logged')
    (loss,) = losses(low=True).values()
    assert loss.isfinite()
    loss.backward()
    prepare_run(model, wrapper('bfloat16'))  # resumed: it is off already
    assert len(caplog.records) == 1
    model.train_cfg = {}


@pytest.mark.parametrize('dtype', ['float16', None])
def test_other_data_types_keep_it(step, wrapper, caplog, dtype):
    losses, model = step
    prepare_run(model, wrapper(dtype))
    assert 'acc_pose' in losses(low=False)
    assert not caplog.records


def test_wrapped_models_and_several_optimizers(step, wrapper):
    _, model = step
    parallel = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    nn.Module.__init__(parallel)
    parallel.module = model
    prepare_run(parallel, OptimWrapperDict(one=wrapper(None), other=wrapper('bfloat16')))
    assert model.train_cfg == dict(compute_acc=False)
    model.train_cfg = {}


def test_weights_of_bfloat16(step, wrapper):
    _, model = step
    model.head.bfloat16()
    prepare_run(model, wrapper(None))
    model.head.float()
    assert model.train_cfg == dict(compute_acc=False)
    model.train_cfg = {}


def test_models_without_such_a_head_are_left_alone(wrapper, caplog):
    model = nn.Linear(1, 1)
    prepare_run(model, wrapper('bfloat16'))
    assert not hasattr(model, 'train_cfg')
    assert not caplog.records


def test_pose_configs_have_it():
    cfg = Config.fromfile(find_config(TINY))
    assert dict(type='mmhrformer.BFloat16PoseHook') in cfg.custom_hooks

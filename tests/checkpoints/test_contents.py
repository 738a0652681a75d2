"""Location of the weights in a file, and wrappers of their names."""

from __future__ import annotations

import copy
from functools import cache

import golden
import pytest
import torch
from mmengine.runner import load_checkpoint as mmengine_load
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from mmhrformer import HRFormer, load_checkpoint
from mmhrformer.checkpoints import convert, unwrap
from mmhrformer.checkpoints.contents import SWAPPED, find_weights

pytestmark = pytest.mark.once

TINY = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)


class Model(nn.Module):
    """A model with a backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = HRFormer(arch=TINY)
        self.head = nn.Linear(2, 3)


class Lightning(nn.Module):
    """A typical LightningModule: the model, its loss and its metrics."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(3))
        self.register_buffer('seen', torch.tensor(7))


@cache
def weights() -> dict[str, Tensor]:
    """Weights of a model; not to be modified."""
    made = Model()
    golden.recipe.fill_module(made)
    return dict(made.state_dict())


def model() -> Model:
    made = Model()
    made.load_state_dict(weights())
    return made


def compiled(part: nn.Module) -> nn.Module:
    return torch.compile(part, backend='eager')


def in_part(wrapper) -> nn.Module:
    """The model with a wrapped backbone, and a part of it that is wrapped once more."""
    made = model()
    made.backbone.stage3 = wrapper(made.backbone.stage3)
    made.backbone = wrapper(made.backbone)
    return made


WRAPPED = {
    'DataParallel': lambda: nn.DataParallel(model()),
    'compile': lambda: compiled(model()),
    'both': lambda: nn.DataParallel(compiled(model())),
    'compile in part': lambda: in_part(compiled),
    'DataParallel in part': lambda: in_part(nn.DataParallel),
    'checkpoint_wrapper': lambda: checkpoint_wrapper(model()),
    'AveragedModel': lambda: AveragedModel(model()),
    'Lightning': lambda: Lightning(model()),
    'Lightning and compile': lambda: Lightning(compiled(model())),
    'compile and Lightning': lambda: compiled(Lightning(model())),
}
OUTSIDE = {'n_averaged', 'seen', 'loss.weight'}


def same(tensors: dict, expected: dict) -> bool:
    return tensors.keys() == expected.keys() and all(
        torch.equal(tensors[key], expected[key]) for key in expected
    )


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name', WRAPPED)
def test_names_of_wrapped_models(name, tmp_path):
    wrapped = WRAPPED[name]()
    content = {'state_dict': wrapped.state_dict(), 'epoch': 3}
    contents = find_weights(content)
    tensors = {key: t for key, t in contents.tensors.items() if key not in OUTSIDE}
    assert same(tensors, weights())
    assert {contents.names[key] for key in tensors} <= wrapped.state_dict().keys()
    # Through all doors, and into the wrapped model itself.
    torch.save(content, tmp_path / 'a.pth')
    plain, scheme = Model(), Model()
    report = load_checkpoint(plain, tmp_path / 'a.pth', strict=True)
    mmengine_load(scheme, f'mmhrformer://{tmp_path}/a.pth', strict='Averaged' not in name)
    assert same(plain.state_dict(), weights())
    assert same(scheme.state_dict(), weights())
    assert {key.split('model.')[-1].removeprefix('_orig_mod.') for key in report.outside} <= OUTSIDE
    assert len(report.outside) == (2 if 'Lightning' in name else name == 'AveragedModel')
    # And plain names into the wrapped model.
    for tensor in wrapped.state_dict().values():
        tensor.zero_()
    load_checkpoint(wrapped.model if hasattr(wrapped, 'loss') else wrapped, weights())
    tensors = unwrap(wrapped.state_dict())
    assert same({key: t for key, t in tensors.items() if key not in OUTSIDE}, weights())


PREFIXES = [
    'net.',
    'encoder.',
    'model.model.',
    'module.module.',
    '_forward_module.model._orig_mod.',
]


@pytest.mark.parametrize('prefix', PREFIXES)
@pytest.mark.parametrize('table', ['keys_cls_tiny.json', 'keys_seg_small_w7.json'])
def test_prefixes_before_the_names_of_other_codes(prefix, table):
    tensors = {
        key: torch.empty(0, device='meta')
        for key, *_ in golden.recipe.load_keys(golden.DATA / table)
    }
    wrapped = {prefix + key: tensor for key, tensor in tensors.items()}
    assert set(convert(unwrap(wrapped))[0]) == set(convert(tensors)[0])


@pytest.mark.parametrize('prefix', ['', 'net.', 'module.', 'net._orig_mod.'])
def test_backbones_take_wrapped_names_by_load_state_dict(prefix):
    expected = {k.removeprefix('backbone.'): t for k, t in weights().items() if k[:4] == 'back'}
    for start in (prefix, f'{prefix}backbone.'):
        made = HRFormer(arch=TINY)
        made.load_state_dict({start + key: tensor for key, tensor in expected.items()})
        assert same(made.state_dict(), expected)
    whole = nn.ModuleDict(dict(backbone=HRFormer(arch=TINY)))
    parts = {f'backbone._orig_mod.{k}': tensor for k, tensor in expected.items()}
    whole.load_state_dict(parts)
    assert same(whole['backbone'].state_dict(), expected)


def test_names_that_are_ambiguous_are_refused():
    one = {f'module.{key}': tensor for key, tensor in weights().items()}
    with pytest.raises(
        ValueError, match=r"has '\S+' and '\S+', which are the same tensor of a model"
    ):
        unwrap({**one, **weights()})
    two = {f'{who}.{k}': t for who in ('student', 'teacher') for k, t in weights().items()}
    with pytest.raises(ValueError, match=r"several models, under \['student\.', 'teacher\.'\]"):
        unwrap(two)
    assert same(unwrap(two, 'teacher'), weights())
    with pytest.raises(ValueError, match=r"key='pupil': the checkpoint has no weights there"):
        unwrap(two, 'pupil')


def test_two_backbones_in_one_model_stay_two():
    both = nn.ModuleDict(dict(backbone=HRFormer(arch=TINY), second=HRFormer(arch=TINY)))
    golden.recipe.fill_module(both)
    other = copy.deepcopy(both)
    golden.recipe.fill_module(other['second'])
    load_checkpoint(other, both.state_dict(), strict=True)
    assert same(other.state_dict(), both.state_dict())


# Files with several weights


def halved(tensors: dict) -> dict:
    return {key: t / 2 if t.is_floating_point() else t for key, t in tensors.items()}


SEVERAL = {
    'state_dict_ema': lambda raw, ema: {'state_dict': raw, 'state_dict_ema': ema},
    'model_ema': lambda raw, ema: {'model': raw, 'model_ema': ema, 'args': {}},
    'ema': lambda raw, ema: {'model': raw, 'ema': {'state_dict': ema, 'decay': 0.9}},
    'average_model': lambda raw, ema: {'model': raw, 'average_model': ema},
    'SWA': lambda raw, ema: {'model': raw, 'SWA': ema},
    'teacher': lambda raw, ema: {'teacher': ema, 'state_dict': raw},
    'ema_model': lambda raw, ema: {**raw, **{f'ema_model.module.{k}': t for k, t in ema.items()}},
    'model.ema': lambda raw, ema: {
        'state_dict': {
            f'model.{key}': tensor
            for key, tensor in {**raw, **{f'ema.{k}': t for k, t in ema.items()}}.items()
        }
    },
}


@pytest.mark.parametrize('key', SEVERAL)
def test_other_weights_are_told_and_can_be_taken(key, tmp_path, messages):
    content = SEVERAL[key](weights(), halved(weights()))
    torch.save(content, tmp_path / 'a.pth')
    made, file = Model(), tmp_path / 'a.pth'
    report = load_checkpoint(made, file, strict=True)
    assert same(made.state_dict(), weights())
    assert list(report.others) == [key]
    assert f"others under '{key}'" in messages[-1]
    assert f"load_checkpoint(model, FILE, key='{key}')" in messages[-1]
    assert f'convert_checkpoint.py --key {key}' in messages[-1]
    assert ('averaged, judging by the name' in messages[-1]) == (key != 'teacher')
    mmengine_load(Model(), f'mmhrformer://{file}')
    assert any(f"others under '{key}'" in message for message in messages[-3:])
    load_checkpoint(made, file, strict=True, key=key)
    assert same(made.state_dict(), halved(weights()))


def test_the_averaged_weights_of_mmengine_are_those_taken(tmp_path, messages):
    """mmengine's EMAHook swaps the two in the file."""
    raw = {f'module.{key}': tensor for key, tensor in weights().items()}
    averaged = {key: torch.zeros_like(tensor) for key, tensor in weights().items()}
    raw['steps'] = torch.tensor(3)
    torch.save({'meta': {}, 'state_dict': averaged, 'ema_state_dict': raw}, tmp_path / 'a.pth')
    made = Model()
    report = load_checkpoint(made, tmp_path / 'a.pth', strict=True)
    assert report.others == {'ema_state_dict': SWAPPED}
    assert same(made.state_dict(), averaged)
    assert "EMAHook saves the averaged weights as 'state_dict'" in messages[-1]
    report = load_checkpoint(made, tmp_path / 'a.pth', strict=True, key='ema_state_dict')
    assert same(made.state_dict(), weights())
    assert report.outside == ['steps']
    # The hook finds both behind the scheme, too.
    content = mmengine_load(made, f'mmhrformer://{tmp_path}/a.pth', strict=True)
    assert same(made.state_dict(), averaged)
    assert same(content['ema_state_dict'], raw)


def test_whole_modules_beside_weights_are_told(tmp_path, messages):
    torch.save({'model': weights(), 'ema': Model()}, tmp_path / 'a.pth')
    made = Model()
    load_checkpoint(made, tmp_path / 'a.pth', strict=True)
    assert f"others under 'ema' (a whole {__name__}.Model)" in messages[-1]
    with pytest.raises(ValueError, match=r"no weights there.*\['ema'\]\.state_dict\(\), NEW_FILE"):
        load_checkpoint(made, tmp_path / 'a.pth', key='ema')

"""Reading checkpoint files, also broken and malicious ones."""

from __future__ import annotations

import argparse
import copyreg
import datetime
import functools
import io
import os
import pickle
import random
import re
import struct
import sys
import types
from collections import (
    ChainMap,
    Counter,
    OrderedDict,
    UserDict,
    UserList,
    defaultdict,
    deque,
    namedtuple,
)
from collections.abc import Iterator
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS

from mmhrformer.checkpoints import read_checkpoint, reading, unwrap
from mmhrformer.checkpoints.reading import find_damage

FORMATS = pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])


def make_tensors() -> OrderedDict:
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    return OrderedDict(
        weight=base,
        view=base[2:, ::2],
        half=torch.ones(3, dtype=torch.float16),
        bfloat=torch.ones(3, dtype=torch.bfloat16),
        double=torch.randn(2).double(),
        count=torch.tensor(3),
        index=torch.arange(4, dtype=torch.int32),
        mask=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(torch.randn(2)),
    )


def save(content, path: Path, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(tensors: dict, expected: dict) -> None:
    assert list(tensors) == list(expected)
    for key, tensor in expected.items():
        assert tensors[key].dtype == tensor.dtype
        assert torch.equal(tensors[key], tensor), key


@FORMATS
def test_tensors_and_plain_values_are_read(tmp_path, zipped):
    meta = {'epoch': 7, 'lr': [1e-3, None, (True, 'a')], 'names': {'a', 'b'}, 'groups': {1: 2}}
    path = save({'state_dict': make_tensors(), 'meta': meta}, tmp_path / 'a.pth', zipped)
    for argument in (path, str(path)):
        content = read_checkpoint(argument)
        assert_same(content['state_dict'], make_tensors())
        assert content['meta'] == meta


@FORMATS
def test_official_classification_file_is_read_without_yacs(tmp_path, monkeypatch, zipped):
    class CfgNode(dict):
        def __init__(self, values):
            super().__init__(values)
            self.__dict__['__immutable__'] = True

    module = types.ModuleType('yacs.config')
    CfgNode.__module__, CfgNode.__qualname__, module.CfgNode = 'yacs.config', 'CfgNode', CfgNode
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
        patch.setitem(sys.modules, 'yacs.config', module)
        config = CfgNode({'MODEL': CfgNode({'NAME': 'hrt_tiny', 'DROP': 0.1})})
        content = {'model': make_tensors(), 'config': config, 'epoch': 299, 'amp': {}}
        path = save(content, tmp_path / 'hrt_tiny.pth', zipped)
    content = read_checkpoint(path)
    assert_same(content['model'], make_tensors())
    assert content['epoch'] == 299
    assert 'yacs' not in sys.modules


def test_checkpoint_of_an_openmmlab_run_is_read(tmp_path):
    hub = MessageHub.get_instance('test_reading')
    hub.update_scalar('train/loss', 0.5)
    hub.update_info('iter', np.int64(3))
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        'meta': {'seed': np.float32(1), 'mean': np.ones(3), 'shape': torch.Size([2, 3])},
        'state_dict': model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'message_hub': hub.state_dict(),
        'args': argparse.Namespace(path=Path('a'), device=torch.device('cuda:0')),
        'counts': defaultdict(int, a=1),
    }
    content = read_checkpoint(save(content, tmp_path / 'epoch_1.pth'))
    assert_same(content['state_dict'], model.state_dict())
    assert content['optimizer']['state'][0]['step'] == 1


def scheduler_states() -> Iterator[tuple[str, dict]]:
    """State as stored by the schedulers of mmengine."""
    options = dict(
        CosineAnnealing=dict(T_max=9),
        CosineRestart=dict(periods=[2, 3], restart_weights=[1, 0.5], eta_min=0),
        Exponential=dict(gamma=0.9),
        MultiStep=dict(milestones=[170, 200, 200]),
        OneCycle=dict(eta_max=0.1, total_steps=9),
        QuadraticWarmup=dict(end=9),
        ReduceOnPlateau=dict(monitor='loss'),
        Step=dict(step_size=2),
    )
    optimizer = OptimWrapper(torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()))
    for name, scheduler in PARAM_SCHEDULERS.module_dict.items():
        if name.endswith('LR') and not name.startswith('Warmup'):
            kwargs = options.get(name.removesuffix('LR'), {})
            yield name, scheduler(optimizer, **kwargs).state_dict()


def optimizer_states() -> Iterator[tuple[str, dict]]:
    """State as stored by the optimizers of torch after a step."""
    for name, kind in vars(torch.optim).items():
        if not isinstance(kind, type) or name in ('Optimizer', 'SparseAdam'):
            continue
        model = torch.nn.Linear(2, 2, bias=False)
        optimizer = kind(model.parameters(), lr=0.1)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step(lambda: torch.ones(()))
        yield name, optimizer.state_dict()


Point = namedtuple('Point', 'x y')
Color = Enum('Color', 'RED')


def odd_objects() -> dict:
    """Other content that may be stored besides weights, by name."""
    loop, objects = [], types.SimpleNamespace()
    loop.append(loop)
    objects.self = objects
    with_attribute = torch.ones(2)
    with_attribute.note = 'kept by Python, not needed'
    return dict(
        scalars=[np.float64(0.5), np.int32(3), np.bool_(True), np.str_('a'), np.datetime64('2021')],
        arrays=[np.ones(3), np.array([{}], dtype=object), np.ma.array([1]), np.dtype('f4')],
        generators=[np.random.default_rng(0), np.random.get_state(), random.Random(0)],
        times=[datetime.datetime.now(), datetime.timedelta(1), datetime.timezone.utc],
        numbers=[Decimal('0.1'), Fraction(1, 3), 1j, 2**99, slice(1, 2), range(3), Ellipsis],
        texts=[b'', bytearray(b'a'), re.compile('a'), Path('a'), ValueError('a')],
        functions=[print, functools.partial(sorted, key=len), type(None), OrderedDict],
        containers=[ChainMap({}), UserDict(a=1), UserList([1]), Point(1, 2), loop, objects],
        keys={Point(1, 2): 1, np.int64(3): 2, Color.RED: 3, frozenset({1}): 4, torch.float32: 5},
        sets=[{Color.RED, np.int64(1)}, {Point(1, 2)}],
        torch=[torch.strided, torch.get_rng_state(), torch.quint8, torch.eye(2).to_sparse()],
        mmengine=[ConfigDict(a=1), Config(dict(a=1)), HistoryBuffer([1], [1])],
        modules=[torch.nn.CrossEntropyLoss(), with_attribute, torch.ones(2, device='meta')],
    )


@FORMATS
def test_whatever_stands_beside_weights_is_read(tmp_path, zipped):
    things = {**dict(scheduler_states()), **dict(optimizer_states()), **odd_objects()}
    assert {'MultiStepLR', 'OneCycleLR', 'PolyLR', 'LBFGS', 'AdamW'} <= set(things)
    content = {'things': things, 'state_dict': make_tensors(), 'after': 7}
    content = read_checkpoint(save(content, tmp_path / 'a.pth', zipped))
    assert_same(content['state_dict'], make_tensors())
    assert content['after'] == 7
    assert list(content['things']) == list(things)
    assert content['things']['MultiStepLR'] == things['MultiStepLR']
    assert len(content['things']['keys']) == 5
    again = pickle.loads(pickle.dumps(content))  # it may be sent to another process
    assert repr(again['things']['mmengine']) == repr(content['things']['mmengine'])


def test_plain_containers_come_out_as_they_were(tmp_path):
    things = [
        Counter('aab'),
        deque([1, 2], 3),
        defaultdict(list, a=[1]),
        frozenset({1}),
        {1j},
        b'a',
    ]
    got = read_checkpoint(save({'things': things}, tmp_path / 'a.pth'))['things']
    assert got == things
    assert got[1].maxlen == 3
    assert got[2]['missing'] == []


def test_what_is_left_inert_is_named(tmp_path, messages):
    content = {
        'state_dict': make_tensors(),
        'date': datetime.date(2021, 6, 30),
        'point': Point(1, 2),
    }
    content = read_checkpoint(save(content, tmp_path / 'a.pth'))
    assert f'left inert: datetime.date, {__name__}.Point' in messages[-1]
    assert 'a.pth' in messages[-1]
    assert content['date'].stored == 'datetime.date'
    count = len(messages)
    read_checkpoint(save({'state_dict': make_tensors()}, tmp_path / 'a.pth'))
    assert len(messages) == count


class Evil:
    """A malicious object: unpickling it calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


ATTACKS = {
    f'{os.system.__module__}.system': lambda marker: Evil(os.system, f'touch {marker}'),
    'builtins.exec': lambda marker: Evil(exec, f'open({str(marker)!r}, "w")'),
    'builtins.eval': lambda marker: Evil(eval, f'open({str(marker)!r}, "w")'),
    f'{open.__module__}.open': lambda marker: Evil(io.open, str(marker), 'w'),
    'torch.serialization.save': lambda marker: Evil(torch.save, {}, str(marker)),
}


@pytest.mark.parametrize('name', ATTACKS)
@pytest.mark.parametrize('place', ['zip', 'legacy', 'pickle'])
def test_code_in_a_file_does_not_run(tmp_path, place, name, messages):
    """Beside weights it is inert and named; in the place of a weight it is refused."""
    marker = tmp_path / 'marker'
    content = {'state_dict': make_tensors(), 'meta': ATTACKS[name](marker)}
    path = tmp_path / 'evil.pth'
    if place == 'pickle':
        path.write_bytes(pickle.dumps(content['meta']))
        with pytest.raises(ValueError, match=r'evil\.pth.*not in a checkpoint format'):
            read_checkpoint(path)
    else:
        weights = {**make_tensors(), 'conv1.weight': content['meta']}
        save({'state_dict': weights}, path, zipped=place == 'zip')
        with pytest.raises(
            ValueError, match=f"'conv1.weight' is stored as {name}, not as a tensor"
        ):
            unwrap(read_checkpoint(path))
        save(content, path, zipped=place == 'zip')
        assert_same(read_checkpoint(path)['state_dict'], make_tensors())
        assert f'left inert: {name}' in messages[-1]
    assert not marker.exists()
    torch.load(path, weights_only=False) if place != 'pickle' else pickle.loads(path.read_bytes())
    assert marker.exists()  # it was a real attack


def test_stand_ins_for_library_objects_do_not_run_either(tmp_path):
    marker = tmp_path / 'marker'
    evil = Evil(np.save, str(marker), np.ones(1))
    path = save({'state_dict': make_tensors(), 'meta': evil}, tmp_path / 'evil.pth')
    assert_same(read_checkpoint(path)['state_dict'], make_tensors())
    assert not list(tmp_path.glob('marker*'))


class SavesOnLoading(torch.nn.Module):
    """A model whose TorchScript code writes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.path)


def hide_from_python(archive: bytes) -> bytes:
    """Put a second list of contents, without what tells TorchScript, where zipfile looks.

    zipfile takes the list that ends where the end record begins, torch the one at the offset
    that the end record gives.
    """
    end = archive.rindex(b'PK\5\6')
    size, offset = struct.unpack_from('<II', archive, end + 12)
    contents = archive[offset : offset + size]
    decoy = contents.replace(b'constants.pkl', b'constants.pkk')
    return archive[: offset + size] + decoy + archive[end:]


@pytest.mark.parametrize('disguise', [bytes, hide_from_python], ids=['plain', 'disguised'])
def test_torchscript_is_refused_and_does_not_run(tmp_path, disguise):
    """``torch.load`` hands such files to the TorchScript interpreter, which can write files."""
    marker, path = tmp_path / 'marker', tmp_path / 'model.pth'
    torch.jit.save(torch.jit.script(SavesOnLoading(str(marker))), path)
    path.write_bytes(disguise(path.read_bytes()))
    with pytest.raises(ValueError, match=r'model\.pth'):
        read_checkpoint(path)
    assert not marker.exists()
    torch.jit.load(path)
    assert marker.exists()  # it was a real attack


# Instructions of pickle that torch.save does not write, or not in this way.
HANDMADE = {
    'class of an old kind': b'(ios\nsystem\n.',
    'object of an old kind': b'(cos\nsystem\nVtouch x\no.',
    'new object': b'cos\nsystem\n)\x81.',
    'new object with keywords': b'cos\nsystem\n)}\x92.',
    'state': b'cos\nsystem\n}Va\nK\x01sb.',
    'states of an attribute': b'cos\nsystem\nN}Va\nK\x01s\x86b.',
    'list': b'cos\nsystem\n(K\x01K\x02e.',
    'item': b'cos\nsystem\nK\x01a.',
    'dict': b'cos\nsystem\n(K\x01K\x02u.',
    'set': b'cos\nsystem\n(K\x01\x90.',
    'called twice': b'cos\nsystem\n)R)R.',
    'of the stack': b'\x8c\x02os\x8c\x06system\x93.',
    'attribute of an attribute': b'\x8c\x02os\x8c\x0bpath.system\x93.',
    'extension': b'\x82\x07.',
    'long extension': b'\x84\x07\x00\x00\x00.',
}


@pytest.mark.parametrize('name', HANDMADE)
def test_every_instruction_of_pickle_is_inert(name, monkeypatch):
    monkeypatch.setitem(copyreg._inverted_registry, 7, ('os', 'system'))
    monkeypatch.setitem(copyreg._extension_cache, 7, os.system)
    names = set()
    unpickler = type('Unpickler', (reading._Unpickler,), dict(inert=names))
    made = unpickler(io.BytesIO(HANDMADE[name])).load()
    assert isinstance(made, reading.Inert)
    assert len(names) == 1
    assert made.stored in names


def test_a_file_changes_nothing_that_is_real():
    """States could give functions other defaults, and classes other methods."""
    unpickler = type('Unpickler', (reading._Unpickler,), dict(inert=set()))
    state = b'N}V__defaults__\nK\x01\x85s\x86b.'
    for name in ('torch._utils\n_rebuild_tensor_v2', 'torch._utils\n_rebuild_parameter'):
        function = unpickler(io.BytesIO(f'c{name}\n'.encode() + state)).load()
        assert function.__defaults__ != (1,)
    kind = unpickler(io.BytesIO(b'ctorch\nUntypedStorage\nN}Vcpu\nK\x01s\x86b.')).load()
    assert kind.cpu != 1
    unpickler.find_class = lambda *_: lambda: torch.ones(1)
    tensor = unpickler(io.BytesIO(b'ca\nb\n)R}b.'))
    with pytest.raises(
        pickle.UnpicklingError, match='it stores tensors in a way that torch does not'
    ):
        tensor.load()


class Net(torch.nn.Module):
    """A model that can be saved whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stage2 = torch.nn.Linear(2, 2)


WHOLE = {
    'module': lambda: Net(),
    'DataParallel': lambda: torch.nn.DataParallel(Net()),
    'model': lambda: {'model': Net(), 'epoch': 3},
    'state_dict': lambda: {'epoch': 3, 'state_dict': Net()},
    'checkpoint': lambda: {'net': Net(), 'optimizer': torch.optim.SGD(Net().parameters(), lr=1)},
    'tuple': lambda: (3, Net()),
    'list of tensors by name': lambda: [3, Net().state_dict()],
    'nested': lambda: {'ema': {'module': Net()}},
}


@FORMATS
@pytest.mark.filterwarnings('ignore:Couldn.t retrieve source code', 'ignore:source code of class')
@pytest.mark.parametrize('name', WHOLE)
def test_whole_models_are_an_error_whose_remedy_works(tmp_path, name, zipped):
    path, new = save(WHOLE[name](), tmp_path / 'model.pth', zipped), tmp_path / 'new.pth'
    with pytest.raises(ValueError, match='if you trust its source') as error:
        unwrap(read_checkpoint(path))
    (remedy,) = re.findall(r'torch\.save\(.*, NEW_FILE\)', str(error.value))
    exec(remedy, dict(torch=torch, FILE=path, NEW_FILE=new))
    tensors = unwrap(read_checkpoint(new))
    assert {key.removeprefix('module.') for key in tensors} == {'stage2.weight', 'stage2.bias'}


def test_torchscript_is_an_error_whose_remedy_works(tmp_path):
    path, new = tmp_path / 'model.pth', tmp_path / 'new.pth'
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match='it is a TorchScript program') as error:
        read_checkpoint(path)
    (remedy,) = re.findall(r'torch\.save\(.*, NEW_FILE\)', str(error.value))
    exec(remedy, dict(torch=torch, FILE=path, NEW_FILE=new))
    assert set(read_checkpoint(new)) == {'weight', 'bias'}


class Subclass(torch.Tensor):
    """A tensor whose numbers may mean something else."""


NO_TENSORS = {
    'numpy': lambda: np.ones(2),
    'list': lambda: [1.0, 2.0],
    'number': lambda: 3,
    'sparse': lambda: torch.eye(2).to_sparse(),
    'quantized': lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    'without numbers': lambda: torch.ones(2, device='meta'),
    'subclass': lambda: torch.ones(2).as_subclass(Subclass),
    'not materialized': lambda: torch.nn.UninitializedParameter(),
}


@pytest.mark.parametrize('name', NO_TENSORS)
def test_weights_that_are_no_tensors_are_refused_by_name(tmp_path, name):
    content = {'state_dict': {'a.weight': torch.ones(1), 'b.weight': NO_TENSORS[name]()}}
    content = read_checkpoint(save(content, tmp_path / 'a.pth'))
    with pytest.raises(
        ValueError, match=r"the weight 'b\.weight' is stored as \S+, not as a tensor"
    ):
        unwrap(content)


def test_tensors_of_other_kinds_that_are_plain_are_read(tmp_path):
    buffer, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    buffer.note = parameter.note = 'an attribute'
    tensors = {'a.buffer': buffer, 'a.parameter': parameter, 'a.conj': torch.ones(2) * 1j}
    tensors['a.conj'] = tensors['a.conj'].conj()
    content = read_checkpoint(save({'state_dict': tensors}, tmp_path / 'a.pth'))
    assert_same(unwrap(content), tensors)


@FORMATS
def test_truncated_file_is_an_error_that_says_so(tmp_path, zipped):
    """A file truncated at any position, as by an interrupted download."""
    content = {'state_dict': make_tensors(), 'large': torch.zeros(4000)}
    good = save(content, tmp_path / 'good.pth', zipped).read_bytes()
    for length in range(4, len(good), 97):
        (tmp_path / 'cut.pth').write_bytes(good[:length])
        with pytest.raises(ValueError, match=r'cannot read the checkpoint .*cut\.pth') as error:
            read_checkpoint(tmp_path / 'cut.pth')
        assert str(error.value).endswith('it is truncated: download it again')


PAGE = 'it is a web page'
OTHER_FILES = {
    b'': "'.*other.pth': it is empty: download it again$",
    b'<html>404</html>': PAGE,
    b'\xef\xbb\xbf\r\n <!DOCTYPE html>\n<html>': PAGE,
    b'<?xml version="1.0"?><Error>AccessDenied</Error>': PAGE,
    '<!doctype html><title>Zugriff für'.encode() + 600 * 'ü'.encode(): PAGE,
    '<html>Zugriff für'.encode('latin-1'): PAGE,
    b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n': 'git lfs pull',
    b'hello': "it is a text file, beginning with 'hello'.*check the path",
    b'{"a": 1}\n': 'it is a text file',
    b'config = 3\n': 'it is a text file',
    b'\x80\x02': 'it is truncated',
    b'\0' * 99: 'not in a checkpoint format',
    b'\x1f\x8b\x08' + b'\1' * 99: 'not in a checkpoint format',
    b'PK\3\4' + b'\0' * 99: 'it is truncated',
}


@pytest.mark.parametrize('content', OTHER_FILES, ids=lambda content: repr(content[:20]))
def test_file_that_is_no_checkpoint_is_an_error_that_says_what_it_is(tmp_path, content):
    (tmp_path / 'other.pth').write_bytes(content)
    with pytest.raises(ValueError, match=r'cannot read the checkpoint .*other\.pth') as error:
        read_checkpoint(tmp_path / 'other.pth')
    assert re.search(OTHER_FILES[content], str(error.value))
    assert '\n' not in str(error.value)


def what_is_wrong(path: Path) -> str:
    """The error message of a file, empty if it can be read."""
    try:
        read_checkpoint(path)
    except ValueError as error:
        return str(error)
    return ''


@FORMATS
def test_damaged_file_is_an_error_that_names_it(tmp_path, zipped):
    """Or it is still read correctly; in any case no other error is raised."""
    good = save({'state_dict': make_tensors()}, tmp_path / 'good.pth', zipped).read_bytes()
    path = tmp_path / 'damaged.pth'
    # The part with the names and shapes; a wrong number in a tensor cannot be noticed.
    start = good.index(b'state_dict') - 20
    errors = []
    for place in range(start, start + 600, 5):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        errors.append(what_is_wrong(path))
    errors = [error for error in errors if error]
    assert len(errors) > 10
    assert all('damaged.pth' in error for error in errors)


@pytest.mark.parametrize('content', [torch.zeros(2), [torch.zeros(2)], 'text'], ids=type)
def test_file_without_names_is_an_error_that_names_it(tmp_path, content):
    path = save(content, tmp_path / 'list.pth')
    with pytest.raises(ValueError, match=f'list.pth.*{type(content).__name__}.*tensors by name'):
        read_checkpoint(path)


@pytest.mark.parametrize('name', ['missing.pth', '.'])
def test_missing_file_is_an_error_that_names_it(tmp_path, name):
    with pytest.raises(FileNotFoundError, match='there is no checkpoint') as error:
        read_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.fixture
def whole_file(tmp_path) -> Path:
    return save(dict(state_dict=dict(weight=torch.rand(1000))), tmp_path / 'a.pth')


def test_a_whole_checkpoint_has_no_damage(whole_file):
    assert find_damage(whole_file) == ''


@pytest.mark.parametrize('left', [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_torn_checkpoint_is_found(whole_file, left):
    os.truncate(whole_file, int(whole_file.stat().st_size * left))
    assert find_damage(whole_file)


def test_a_wrong_byte_is_found(whole_file):
    content = bytearray(whole_file.read_bytes())
    content[len(content) // 2] ^= 1
    whole_file.write_bytes(content)
    assert re.fullmatch("the checksum of '.*data/0' is wrong", find_damage(whole_file))
    with pytest.raises(ValueError, match=r'it is damaged \(the checksum .* copy it again'):
        read_checkpoint(whole_file)


def test_a_missing_checkpoint_is_no_whole_one(tmp_path):
    assert 'No such file' in find_damage(tmp_path / 'epoch_1.pth')


# Safetensors


def make_safetensors(path: Path) -> dict[str, torch.Tensor]:
    package = pytest.importorskip('safetensors.torch')
    tensors = {key: tensor.detach().clone() for key, tensor in make_tensors().items()}
    package.save_file(tensors, path, {'format': 'pt'})
    return tensors


@pytest.mark.parametrize('name', ['a.safetensors', 'a.pth', 'a'])
def test_safetensors_are_recognized_by_their_content(tmp_path, name):
    tensors = make_safetensors(tmp_path / name)
    content = read_checkpoint(tmp_path / name)
    assert set(content) == set(tensors)
    assert_same({key: content[key] for key in tensors}, tensors)


def test_tensors_of_safetensors_are_independent_of_the_file(tmp_path):
    path = tmp_path / 'a.safetensors'
    tensors = make_safetensors(path)
    content = read_checkpoint(path)
    path.write_bytes(b'\0' * path.stat().st_size)
    assert torch.equal(content['weight'], tensors['weight'])
    content['weight'].zero_()  # can be written


def test_suffix_of_safetensors_does_not_make_a_file_one(tmp_path):
    path = save({'state_dict': make_tensors()}, tmp_path / 'a.safetensors')
    assert_same(read_checkpoint(path)['state_dict'], make_tensors())


def test_truncated_safetensors_are_an_error_that_says_so(tmp_path):
    make_safetensors(tmp_path / 'good')
    good = (tmp_path / 'good').read_bytes()
    for length in range(1, len(good), 7):
        (tmp_path / 'cut').write_bytes(good[:length])
        with pytest.raises(ValueError, match=r'cannot read the checkpoint .*cut') as error:
            read_checkpoint(tmp_path / 'cut')
        assert length < 9 or 'it is truncated: download it again' in str(error.value)


def test_damaged_safetensors_are_an_error_that_names_the_file(tmp_path):
    make_safetensors(tmp_path / 'good')
    good, path = (tmp_path / 'good').read_bytes(), tmp_path / 'damaged'
    errors = []
    for place in range(0, 8 + int.from_bytes(good[:8], 'little'), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        errors.append(what_is_wrong(path))
    errors = [error for error in errors if error]
    assert len(errors) > 100
    assert all('cannot read the checkpoint' in error and 'damaged' in error for error in errors)


def test_safetensors_without_the_package_are_an_error_with_the_remedy(tmp_path, monkeypatch):
    make_safetensors(tmp_path / 'a.safetensors')
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ValueError, match=r'a\.safetensors.*pip install safetensors'):
        read_checkpoint(tmp_path / 'a.safetensors')

"""Reading of checkpoint files without running code from them."""

from __future__ import annotations

import codecs
import io
import pickle
import re
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from mmengine.logging import print_log
from torch import Tensor

from .download import check_hash


class Inert(dict):
    """Stand-in for a stored type, function or object: nothing is imported or run.

    A pickle can call it, set items, pass arguments and a state, and use it as a key. Only the items
    are kept, since weights may be in a mapping of an unknown type.

    Attributes:
        stored (str): Name of the type or function in the file.
        is_module (bool): Whether it was a whole ``nn.Module``.
    """

    stored = ''
    is_module = False
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    def __new__(cls, *args, **kwargs) -> Inert:
        # To a pickle, ``cls`` is a class; in fact it is an instance of Inert.
        made = super().__new__(Inert)
        made.stored = cls.stored
        return made

    def __init__(self, *args, **kwargs) -> None:
        super().__init__()

    def __call__(self, *args, **kwargs) -> Inert:
        return Inert.__new__(self)

    def __repr__(self) -> str:
        return f'<{self.stored}>'

    @property
    def __name__(self) -> str:  # torch warns about stored modules by their name
        return self.stored

    def append(self, item: Any) -> None:
        """Ignore what a pickle adds to a stored list or set."""

    extend = add = append


def _parameter(data: Any, requires_grad: bool, *_: Any) -> Any:
    """Build a parameter without its Python attributes."""
    return torch.nn.Parameter(data, requires_grad)


def _tensor_with_attributes(build: Any, kind: Inert, args: tuple, _: Any) -> Any:
    """Build a tensor with Python attributes; subclasses may store codes instead of numbers."""
    known = ('torch.Tensor', 'torch.nn.parameter.Parameter', 'torch.nn.parameter.Buffer')
    return _build(build, args) if _builds_tensor(build) and kind.stored in known else kind()


def _tensor_of_other_device(data: Tensor, dtype: torch.dtype, *_: Any) -> Tensor:
    return data.to(dtype)


def _bytes(text: str, encoding: str) -> bytes:
    """Decode bytes, which are stored as text in the pickle protocol that torch uses."""
    if encoding != 'latin1':
        raise ValueError(encoding)
    return text.encode(encoding)


# Functions that build tensors, as far as this torch has them.
_TENSORS = {
    f'torch._utils.{name}': getattr(torch._utils, name)
    for name in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3')
    if hasattr(torch._utils, name)
} | {
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
    'torch._utils._rebuild_device_tensor_from_cpu_tensor': _tensor_of_other_device,
    'torch._tensor._rebuild_from_type_v2': _tensor_with_attributes,
}


def _builds_tensor(function: Any) -> bool:
    return any(function is build for build in _TENSORS.values())


def _build(build: Any, args: tuple) -> Any:
    """Build a tensor, unless it depends on something unknown, such as a type of another torch."""
    unknown = [arg for arg in args if isinstance(arg, Inert)]
    if unknown and build is not _tensor_with_attributes:
        return unknown[0]()
    return build(*args)


_PLAIN_TYPES = (
    *(bool, int, float, complex, str, tuple, list, dict, set, frozenset),
    *(OrderedDict, defaultdict, Counter, deque, torch.Size, torch.device),
)
_PLAIN = {f'{kind.__module__}.{kind.__qualname__}': kind for kind in _PLAIN_TYPES} | {
    'builtins.long': int,  # Python 2
    '_codecs.encode': _bytes,
}


class _Unpickler(pickle._Unpickler):
    """Unpickler that builds only tensors and plain containers, and stand-ins for everything else.

    It is based on pickle's Python implementation: the one in C allocates whatever size a number in
    the file says, so that a single corrupt byte can get the process killed.
    """

    inert: set[str]
    dispatch = pickle._Unpickler.dispatch.copy()

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as err:
            if isinstance(err.args[0], int):  # a byte that is not an opcode
                raise pickle.UnpicklingError(f'invalid load key {err.args[0]}') from err
            raise

    def find_class(self, module: str, name: str) -> Any:
        # torch writes Python 2 names.
        full = f'{"builtins" if module == "__builtin__" else module}.{name}'
        if full in _TENSORS:
            return _TENSORS[full]
        if full in _PLAIN:
            return _PLAIN[full]
        # Not getattr, which makes torch import submodules.
        found = vars(torch).get(name) if module in ('torch', 'torch.storage') else None
        if isinstance(found, torch.dtype) or (isinstance(found, type) and 'Storage' in name):
            return found
        return self._stand_in(full)

    def _stand_in(self, full: str) -> Inert:
        self.inert.add(full)
        inert = Inert()
        inert.stored = full
        return inert

    def get_extension(self, code: int) -> None:
        self.append(self._stand_in(f'copyreg extension {code}'))

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        if _builds_tensor(function):
            self.stack[-1] = _build(function, args)
            return
        try:
            self.stack[-1] = function(*args)
        except Exception:  # such as a device that this torch does not have
            self.stack[-1] = self._stand_in(getattr(function, '__name__', repr(function)))

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self) -> None:
        """Do not apply stored states to real objects: they could modify functions and classes."""
        state, made = self.stack.pop(), self.stack[-1]
        keys = state if isinstance(state, dict) else ()
        if isinstance(made, Inert):
            made.is_module = '_parameters' in keys and '_modules' in keys
        elif isinstance(made, Tensor):
            raise pickle.UnpicklingError('it stores tensors in a way that torch does not')
        elif type(made) is OrderedDict and '_metadata' in keys:
            made._metadata = state['_metadata']

    dispatch[pickle.BUILD[0]] = load_build


# Error messages of torch, pickle and safetensors -> their meaning.
_MEANINGS = {
    'failed finding central directory|not a ZIP archive|Ran out of input|unexpected EOF|'
    '^EOFError$|^index out of range$|unpack requires a buffer|^negative seek|'
    '[Ii]nvalid ?[Hh]eader ?[Ll]ength|MetadataIncompleteBuffer|'
    'file not fully covered': ('it is truncated: download it again'),
    'invalid load key|Invalid magic number': 'it is not in a checkpoint format',
}
_STACK = re.compile(r'\n(?:Exception raised from|frame #)')  # in messages of torch
_FOLDER = 0x10  # attribute of a folder in a zip file
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes, by the format's definition


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins like a safetensors file, with a length and a JSON header."""
    return head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= _SAFETENSORS_HEADER_LIMIT


def _is_torchscript(data: bytes) -> bool:
    """Whether torch.load would pass a zip file to the TorchScript interpreter."""
    # Use torch's own reader: another one may see other entries in a crafted file.
    return 'constants.pkl' in torch._C.PyTorchFileReader(io.BytesIO(data)).get_all_records()


def find_damage(file: str | Path | BinaryIO) -> str:
    """Find damage in a file of ``torch.save`` by its checksums, which torch does not verify.

    Args:
        file (str | Path | BinaryIO): The file.

    Returns:
        str: The damage, or an empty string.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
            # torch silently reads nothing from an entry that is marked as a folder.
            entries = archive.infolist()
            folders = [e.filename for e in entries if e.is_dir() or e.external_attr & _FOLDER]
    except Exception as err:  # a damaged file can fail in any way
        return str(err) or type(err).__name__
    if broken is not None:
        return f'the checksum of {broken!r} is wrong'
    return f'{folders[0]!r} is not a file' if folders else ''


def _refuse_other_files(head: bytes) -> None:
    """Refuse empty files, web pages, Git LFS pointers and text files."""
    if not head:
        raise ValueError('it is empty: download it again')
    try:
        # Incremental, since the last character of the head may be incomplete.
        text = codecs.getincrementaldecoder('utf-8-sig')().decode(head).strip()
    except UnicodeDecodeError:
        text = head.decode('latin-1').strip()
    if not all(char.isprintable() or char.isspace() for char in text):
        return
    if text.startswith('<'):
        raise ValueError(
            'it is a web page, not a checkpoint: open its URL in a browser, follow its '
            'instructions, and download the file itself'
        )
    if text.startswith('version https://git-lfs'):
        raise ValueError(
            'it is a Git LFS pointer, not the file: run "git lfs pull" in its repository, or '
            'download the file itself'
        )
    raise ValueError(
        f'it is a text file, beginning with {text[:40]!r}, not a checkpoint: check the path'
    )


def _parse(data: bytes, inert: set[str]) -> Any:
    """Parse the bytes of a file, and collect the names of stand-ins."""
    head = data[:512]
    _refuse_other_files(head)
    if _is_safetensors(head):
        try:
            import safetensors.torch
        except ImportError as err:
            raise ValueError('it is a safetensors file: pip install safetensors') from err
        return safetensors.torch.load(data)
    if head.startswith(b'PK\3\4'):
        if _is_torchscript(data):
            raise ValueError(
                'it is a TorchScript program, not a checkpoint: loading it would run code. If you '
                'trust its source, save its weights: torch.save(torch.jit.load(FILE, '
                "'cpu').state_dict(), NEW_FILE)"
            )
        if damage := find_damage(io.BytesIO(data)):
            raise ValueError(f'it is damaged ({damage}): download or copy it again')
    unpickler = type('Unpickler', (_Unpickler,), dict(inert=inert))
    pickles = SimpleNamespace(
        __name__=__name__,
        Unpickler=unpickler,
        load=lambda file, **kwargs: unpickler(file, **kwargs).load(),
    )
    return torch.load(io.BytesIO(data), 'cpu', pickle_module=pickles, weights_only=False)


def save_weights(content: Any) -> str:
    """Explain, with a line of Python, how to save only the weights of some content."""
    place = '.state_dict()' if isinstance(content, Inert) else _place_of_weights(content)
    if place is None:
        return 'save the weights by their names: torch.save(model.state_dict(), NEW_FILE)'
    return (
        'if you trust its source, since this runs its code, save only the weights: '
        f"torch.save(torch.load(FILE, 'cpu', weights_only=False){place}, NEW_FILE)"
    )


def _place_of_weights(content: Any, depth: int = 3) -> str | None:
    """Python expression for the location of a module or of tensors by name; None if absent."""
    if isinstance(content, Inert) and content.is_module:
        return '.state_dict()'
    if isinstance(content, Mapping) and any(isinstance(v, Tensor) for v in content.values()):
        return ''
    items = content.items() if isinstance(content, Mapping) else ()
    items = enumerate(content) if isinstance(content, (list, tuple)) else items
    for key, value in items if depth else ():
        place = _place_of_weights(value, depth - 1)
        if place is not None:
            return f'[{key!r}]{place}'
    return None


def read_checkpoint(path: str | Path, sha256: str = '') -> dict:
    """Read a checkpoint file in any format, on the CPU, without running code from it.

    Tensors, numbers, strings and Python's plain containers are restored as they were saved.
    Everything else (configurations, logs, whole modules) becomes :class:`Inert`, and the log names
    its types. The format is detected from the content. Corrupt bytes are detected by the checksums
    in files of ``torch.save``; files of torch before 1.6 and safetensors files have none.

    Args:
        path (str | Path): A file written by ``torch.save``, or a safetensors file.
        sha256 (str): Its SHA-256, 64 hexadecimal digits. Defaults to ``''``: the digits in its
            name, if any.

    Returns:
        dict: The content of the file.

    Raises:
        DownloadError: If the file has a different SHA-256.
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is not a checkpoint, is a program or a whole module, or
            is a safetensors file and that package is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no checkpoint {str(path)!r}')
    data, inert = path.read_bytes(), set()
    check_hash(path, data, sha256)
    try:
        content = _parse(data, inert)
    except Exception as err:  # a damaged file can fail in any way
        raise ValueError(f'cannot read the checkpoint {str(path)!r}: {_reason(err)}') from err
    if not isinstance(content, dict) or (isinstance(content, Inert) and not content):
        raise ValueError(
            f'{str(path)!r} holds a {name_of_type(content)}, not tensors by name: '
            f'{save_weights(content)}'
        )
    if inert:
        _log_inert(path, inert)
    return content


def _reason(err: Exception) -> str:
    """The meaning of an error of torch, pickle or safetensors."""
    reason = ' '.join(_STACK.split(str(err))[0].split()) or type(err).__name__
    meant = (meaning for signs, meaning in _MEANINGS.items() if re.search(signs, reason))
    return next(meant, reason)


def _log_inert(path: Path, names: set[str]) -> None:
    print_log(
        f'{path}: not needed for the weights and left inert: {", ".join(sorted(names))}',
        'current',
    )


def name_of_type(value: Any) -> str:
    """Name of the type of a stored object, as written in the file."""
    return value.stored if isinstance(value, Inert) else type(value).__name__

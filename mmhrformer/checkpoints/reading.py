"""Read checkpoint files without running what they contain."""

from __future__ import annotations

import codecs
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# What tensors, and the numbers stored beside them, are made of.
_SAFE = {
    ('collections', 'OrderedDict'),
    ('collections', 'defaultdict'),
    ('builtins', 'set'),
    ('builtins', 'complex'),
    ('builtins', 'int'),
    ('torch', 'Size'),
    ('torch', 'device'),
    ('torch', 'Tensor'),
    ('torch.nn.parameter', 'Parameter'),
    ('torch._utils', '_rebuild_tensor'),
    ('torch._utils', '_rebuild_tensor_v2'),
    ('torch._utils', '_rebuild_parameter'),
    ('torch.storage', 'UntypedStorage'),
    ('torch.storage', 'TypedStorage'),
}
_SAFE_TORCH_SUFFIXES = ('Storage',)
# What training codes store beside the weights. Nothing of it is needed here, so it becomes inert.
_INERT_MODULES = ('mmengine', 'mmcv', 'numpy', 'yacs.config', 'argparse', 'pathlib', 'datetime')
_INERT = {('builtins', 'getattr'), ('_codecs', 'encode')}


class _Inert(dict):
    """Stands for a stored object that is not needed: takes any state, does nothing."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__()

    def __call__(self, *args, **kwargs) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _Unpickler(pickle._Unpickler):
    """Builds tensors and plain containers, and refuses to import anything else.

    It is pickle's own in Python: the one in C reserves as much memory as a number in the file says,
    so that a single wrong byte can make the system end the process.
    """

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as err:
            if isinstance(err.args[0], int):  # a byte that is no instruction
                raise pickle.UnpicklingError(f'invalid load key {err.args[0]}') from err
            raise

    def find_class(self, module: str, name: str) -> Any:
        if module == '__builtin__':  # what torch writes names it as Python 2 did
            module, name = 'builtins', 'int' if name == 'long' else name
        if (module, name) in _SAFE:
            return super().find_class(module, name)
        if module == 'torch' and name.endswith(_SAFE_TORCH_SUFFIXES):
            return super().find_class(module, name)
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        known = any(module == m or module.startswith(m + '.') for m in _INERT_MODULES)
        if known or (module, name) in _INERT:
            return _Inert
        raise pickle.UnpicklingError(
            f"it wants to import '{module}.{name}', which weights never need and which could run "
            'code on this machine. If you trust its source, re-save only the weights: '
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)"
        )


def _load(file: Any, **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


_PICKLE = SimpleNamespace(
    __name__='mmhrformer.checkpoints.reading', Unpickler=_Unpickler, load=_load
)


# What torch, pickle and safetensors say -> what it means.
_MEANINGS = {
    'failed finding central directory|not a ZIP archive|Ran out of input|unexpected EOF|'
    '^EOFError$|^index out of range$|unpack requires a buffer|'
    '[Ii]nvalid ?[Hh]eader ?[Ll]ength|MetadataIncompleteBuffer|'
    'file not fully covered': ('it is cut off: download it again'),
    'invalid load key|Invalid magic number': 'it has no format that checkpoints have',
}
_STACK = re.compile(r'\n(?:Exception raised from|frame #)')  # what torch adds to its messages
_FOLDER = 0x10  # the mark of a folder in a zip file
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes, by the format's definition


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a header and the header, which is JSON."""
    return head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= _SAFETENSORS_HEADER_LIMIT


def _is_torchscript(path: Path) -> bool:
    """Whether torch.load would hand a zip file to the TorchScript interpreter."""
    # torch's own reader: another one can see other entries in a file made to deceive it.
    return 'constants.pkl' in torch._C.PyTorchFileReader(str(path)).get_all_records()


def _is_folder(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry is marked as a folder: torch reads nothing there and says nothing."""
    return entry.is_dir() or bool(entry.external_attr & _FOLDER)


def _check_sums(path: Path) -> None:
    """Compare the contents of a zip file with the checksums in it, which torch does not do."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            folders = [entry.filename for entry in archive.infolist() if _is_folder(entry)]
    except Exception as err:  # a damaged file can fail in any way
        raise ValueError(f'it is damaged ({err}): download or copy it again') from err
    if broken is not None:
        raise ValueError(
            f'it is damaged (the checksum of {broken!r} is wrong): download or copy it again'
        )
    if folders:
        raise ValueError(f'it is damaged ({folders[0]!r} is no file): download or copy it again')


def _refuse_other_files(head: bytes) -> None:
    """Say what a file is that begins like none of the formats of checkpoints."""
    if not head:
        raise ValueError('it is empty: download it again')
    try:
        # A character may be cut in two at the end of the head.
        text = codecs.getincrementaldecoder('utf-8-sig')().decode(head).strip()
    except UnicodeDecodeError:
        text = head.decode('latin-1').strip()
    if not all(char.isprintable() or char.isspace() for char in text):
        return
    if text.startswith('<'):
        raise ValueError(
            'it is a web page, not a checkpoint: open its address in a browser, see what it asks '
            'for, and download the file itself'
        )
    if text.startswith('version https://git-lfs'):
        raise ValueError(
            'it is a Git LFS pointer, which stands for the file: call "git lfs pull" in the '
            'repository it is from, or download the file itself'
        )
    raise ValueError(f'it is text, beginning with {text[:40]!r}, not a checkpoint: check the path')


def _read(path: Path) -> Any:
    with path.open('rb') as file:
        head = file.read(512)
    _refuse_other_files(head)
    if _is_safetensors(head):
        try:
            import safetensors.torch
        except ImportError as err:
            raise ValueError(
                'it is a safetensors file, which needs a package: pip install safetensors'
            ) from err
        # Not load_file(), whose tensors would follow what later happens to the file.
        return safetensors.torch.load(path.read_bytes())
    if head.startswith(b'PK\3\4'):
        if _is_torchscript(path):
            raise ValueError(
                'it is a TorchScript program, not a checkpoint: its code would run. Save the '
                "model's state_dict() instead"
            )
        _check_sums(path)
    with path.open('rb') as file:  # newer torch would trust the suffix of a path
        return torch.load(file, 'cpu', pickle_module=_PICKLE, weights_only=False)


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint file of any dialect, on the CPU, without running code from it.

    Stored objects other than tensors and plain containers (configurations, message hubs) are
    replaced by inert stand-ins. The format is told by the content, whatever the file's name.

    Files of ``torch.save`` hold a checksum of each tensor, and a changed byte is found by it. Those
    that torch wrote before 1.6, and safetensors files, hold none: there a changed byte of a tensor
    cannot be told from a right one.

    Args:
        path (str | Path): A file written by ``torch.save``, or a safetensors file.

    Returns:
        dict: What was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no checkpoint, would run code, or is a safetensors
            file and that package is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no checkpoint {str(path)!r}')
    try:
        content = _read(path)
    except Exception as err:  # a damaged file can fail in any way
        reason = ' '.join(_STACK.split(str(err))[0].split()) or type(err).__name__
        meant = [meaning for signs, meaning in _MEANINGS.items() if re.search(signs, reason)]
        reason = meant[0] if meant else reason
        raise ValueError(f'cannot read the checkpoint {str(path)!r}: {reason}') from err
    if not isinstance(content, dict):
        raise ValueError(f'{str(path)!r} holds a {type(content).__name__}, not tensors by name')
    return content

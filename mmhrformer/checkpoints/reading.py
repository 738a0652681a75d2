"""Read checkpoint files without running what they contain."""

from __future__ import annotations

import pickle
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


class _Unpickler(pickle.Unpickler):
    """Builds tensors and plain containers, and refuses to import anything else."""

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


def _is_torchscript(path: Path) -> bool:
    """Whether torch.load would hand the file to the TorchScript interpreter."""
    with path.open('rb') as file:
        if file.read(4) != b'PK\3\4':
            return False
    # torch's own reader: another one can see other entries in a file made to deceive it.
    return 'constants.pkl' in torch._C.PyTorchFileReader(str(path)).get_all_records()


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint file of any dialect, on the CPU, without running code from it.

    Stored objects other than tensors and plain containers (configurations, message hubs) are
    replaced by inert stand-ins.

    Args:
        path (str | Path): A file written by ``torch.save``.

    Returns:
        dict: What was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no checkpoint, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no checkpoint {str(path)!r}')
    try:
        if _is_torchscript(path):
            raise ValueError(
                'it is a TorchScript program, not a checkpoint: its code would run. Save the '
                "model's state_dict() instead"
            )
        content = torch.load(path, 'cpu', pickle_module=_PICKLE, weights_only=False)
    except Exception as err:  # a damaged file can fail in any way
        raise ValueError(f'cannot read the checkpoint {str(path)!r}: {err}') from err
    if not isinstance(content, dict):
        raise ValueError(f'{str(path)!r} holds a {type(content).__name__}, not tensors by name')
    return content

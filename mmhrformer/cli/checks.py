"""Checks for the environment report, run in a separate process until one fails.

This file is run by its path: as a module, it would first import the package, including torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

START = '\x1e'  # before the output of each feature


def run_model() -> str:
    """Build and run a small HRFormer; report what torch was built for."""
    import torch

    from mmhrformer.models import HRFormer

    arch = dict(
        channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1
    )
    HRFormer(arch=arch).eval()(torch.rand(1, 3, 64, 64))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    platform = f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU'
    return f'torch for {platform}, {gpus or "no"} GPU{"s" * (gpus > 1)}'


def find_package() -> None:
    """Look for a package as mmengine does for ``_base_ = 'PACKAGE::CONFIG'``, by pkg_resources."""
    from mmengine.utils import is_installed

    is_installed('mmengine')


def run_nms() -> None:
    """Call an operator of mmcv: imports alone also succeed with a stub of mmcv._ext."""
    import torch
    from mmcv.ops import nms

    nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)


def run(features: list[str]) -> None:
    """Run the checks of features, and print what their functions return."""
    for checks in features:
        print(START, file=sys.stderr, flush=True)
        message = None
        for check in checks.split():
            module, _, function = check.partition(':')
            found = importlib.import_module(module)
            message = getattr(found, function)() if function else None
        print(f'{START}{message or ""}', flush=True)


if __name__ == '__main__':
    here = str(Path(__file__).parent)  # its modules must not be importable at the top level
    sys.path[:] = [folder for folder in sys.path if folder != here]
    run(sys.argv[1:])

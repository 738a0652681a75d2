"""The models of the three tasks and their exported files, which several modules test."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock
from inference_samples import CONFIGS, make_model
from needs import Made
from torch import nn

from mmhrformer.configs import find_config, read_config
from mmhrformer.datasets.meta import names_of_outputs
from mmhrformer.deploy.onnx import export_onnx

SIZES = dict(cls=(32, 32), pose=(128, 96), seg=(96, 96))


@pytest.fixture(scope='session')
def models() -> dict[str, nn.Module]:
    return Made(make_model)


@pytest.fixture(scope='session')
def exported(models, shared_folder) -> dict[str, Path]:
    """Each task exported once, whichever process needs it first; one simplified, which is slow."""

    def make(task: str) -> Path:
        file = shared_folder / f'{task}.onnx'
        with FileLock(f'{file}.lock'):
            if not file.exists():
                names = names_of_outputs(read_config(find_config(CONFIGS[task])))
                options = dict(simplify=task == 'seg', with_normalization=task == 'pose')
                assert export_onnx(models[task], file, SIZES[task], names=names, **options)
        return file

    return Made(make)

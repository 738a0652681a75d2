"""tools/export_onnx.py: what it writes, tells and refuses."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from pathlib import Path

import golden
import numpy as np
import onnx
import onnxruntime
import places
import pytest
import torch

import mmhrformer

TOOL = places.ROOT / 'tools/export_onnx.py'
DIGITS = 'hrformer-demo_1xb64-6e_digits'
FIGURES = 'td-hm_hrformer-demo_1xb16-2e_figures-96x128'
SCENES = 'ocrnet_hrformer-demo_1xb16-100_scenes-96x96'


def save_checkpoint(config: str, path: Path, **meta) -> None:
    model = mmhrformer.get_model(config)
    golden.recipe.fill_module(model)
    torch.save(dict(meta=meta, state_dict=model.state_dict()), path)


def example() -> list[str]:
    """The first example of --help, as arguments."""
    doc = runpy.run_path(str(TOOL))['__doc__']
    line = next(line for line in doc.splitlines() if line.startswith('    python '))
    return shlex.split(line)[4:]  # python -m mmhrformer export_onnx


@pytest.mark.e2e
@pytest.mark.parametrize(
    ('config', 'options', 'told', 'names', 'shape', 'returned'),
    [
        pytest.param(DIGITS, None, 'RGB, normalized', ['0', '1'], (4, 3, 32, 32), (4, 10),
                     marks=pytest.mark.slow),
        (FIGURES, ['--with-normalization', '--batch', '2'], 'RGB, pixels from 0 to 255',
         ['nose', 'left_eye'], (2, 3, 128, 96), (2, 17, 32, 24)),
        pytest.param(SCENES, ['--opset', '16'], 'BGR, normalized', ['sky', 'mountain'],
                     (1, 3, 61, 90), (1, 8, 61, 90), marks=pytest.mark.slow),
    ],
    ids=['cls', 'pose', 'seg'],
)  # fmt: skip
def test_every_task_from_the_command_line(config, options, told, names, shape, returned, tmp_path):
    """The first is the example of --help."""
    meta = dict(dataset_meta=dict(classes=tuple('0123456789'))) if config == DIGITS else {}
    save_checkpoint(config, tmp_path / 'epoch_6.pth', **meta)
    args = [config, 'epoch_6.pth', *options] if options else example()
    shown = places.run([sys.executable, str(TOOL), *args], tmp_path)
    assert f'input    image: {told}\n' in shown
    steps = ('Building', 'Tracing', 'Running torch', 'Simplifying', 'Comparing onnxruntime')
    at = [shown.index(f'INFO - {step}') for step in steps]  # else it would be silent for a minute
    assert at == sorted(at)
    assert 'onnxruntime compared with torch\nbatch       size  max error' in shown
    file = tmp_path / (args[args.index('--out') + 1] if '--out' in args else f'{config}.onnx')
    assert f'written  {file.name}: opset ' in shown
    meta = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(meta['names'])[:2] == names
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    (out,) = session.run(None, {'image': np.zeros(shape, np.float32)})
    assert out.shape == returned


def test_help_shows_an_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [TOOL.name, '--help'])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name='__main__')
    assert stop.value.code == 0
    assert ' '.join(example()) in capsys.readouterr().out


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['hrformer-demo', 'none.pth'], "export_onnx.py: there is no config 'hrformer-demo': did"),
        ([DIGITS, 'none.pth'], 'none.pth'),
        (
            [DIGITS, 'a.pth', '--size', '16', '16'],
            r'size=\(16, 16\): expected height and width of at',
        ),
        ([DIGITS, 'a.pth', '--opset', '9'], 'opset=9: expected 14 to 17'),
        ([DIGITS, 'a.pth', '--out', 'a.pt'], r'ends in \.onnx'),
        (['tta.py', 'a.pth'], 'the config has TestTimeAug: .* use the config that the model was'),
    ],
    ids=['config', 'checkpoint', 'size', 'opset', 'out', 'tta'],
)
def test_mistakes_are_explained(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(DIGITS, tmp_path / 'a.pth')
    (tmp_path / 'tta.py').write_text(
        "test_dataloader = dict(dataset=dict(pipeline=[dict(type='TestTimeAug')]))"
    )
    monkeypatch.setattr(sys, 'argv', [TOOL.name, *args])
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(TOOL), run_name='__main__')
    assert not list(tmp_path.glob('*.onnx'))

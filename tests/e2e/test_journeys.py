"""User journeys with a shipped recipe: train, interrupt, resume, test, use the checkpoint.

Nothing is replaced by a variant for tests, except that the architecture is small, the data are a
few images in the real layout, the schedule has a few steps and training is in float32.
"""

from __future__ import annotations

import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import sklearn.datasets
import torch
from mmengine.runner import load_checkpoint
from PIL import Image
from places import ENV, ROOT, run
from recipes import OTHERS, RECIPES, WHOLE, Recipe, write_config

from mmhrformer import fuse_for_inference, get_inferencer, get_model
from mmhrformer.checkpoints import read_checkpoint, to_dialect, unwrap
from mmhrformer.cli.launch import stock_tool
from mmhrformer.configs import PACKAGES, read_config

pytestmark = pytest.mark.e2e

HALF = 2  # epochs or iterations after which a run is killed
HOURS = 3600  # only so that a test that hangs comes to an end
# To go on from a checkpoint to its use, only for one recipe of each task.
whole = pytest.mark.parametrize('trip', WHOLE, indirect=True)


@dataclass(frozen=True)
class Trip:
    """A recipe that was trained.

    Args:
        recipe (Recipe): What was trained.
        folder (Path): Where, with the data in ``data``.
        config (Path): The config, derived from the shipped one.
        checkpoint (Path): The last checkpoint.
    """

    recipe: Recipe
    folder: Path
    config: Path
    checkpoint: Path

    @property
    def metric(self) -> str:
        return self.recipe.task.metric

    def model(self) -> torch.nn.Module:
        return get_model(self.config, self.checkpoint)

    def test(self, name: str, command: str, *args: object) -> dict:
        """Test the checkpoint by a command with CONFIG in it; return the metrics."""
        option = '--dump' if self.metric == 'coco/AP' else '--out'
        dump = self.folder / f'{name}.{"labels" if self.metric == "mIoU" else "pkl"}'
        args = (*args, option, dump, '--work-dir', self.folder / name)
        run([*words(command, self.config), *map(str, args)], self.folder)
        (results,) = (self.folder / name).glob('*/*.json')
        found = json.loads(results.read_text())
        return {key: value for key, value in found.items() if not key.endswith('time')}

    def predictions(self, name: str) -> dict[str, dict]:
        """Path of each image -> scores of classes, label map, or boxes and key points."""
        found: dict[str, dict] = {}
        for file in (self.folder / f'{name}.labels').glob('*.png'):
            (path,) = self.folder.glob(f'data/cityscapes/leftImg8bit/val/*/{file.name}')
            found[str(path)] = dict(labels=np.array(Image.open(file)))
        if found:
            return found
        for sample in pickle.loads((self.folder / f'{name}.pkl').read_bytes()):
            path = str(self.folder / sample['img_path'])
            if 'pred_score' in sample:
                found[path] = dict(scores=sample['pred_score'].numpy())
                continue
            image = found.setdefault(path, dict(boxes=[], keypoints=[]))
            image['boxes'].append(sample['gt_instances']['bboxes'][0])
            image['keypoints'].append(sample['pred_instances']['keypoints'][0])
        return found

    def scalars(self) -> list[dict]:
        """Losses, rates and metrics that both runs logged, the last lines possibly cut off."""
        files = sorted(self.folder.glob('work/*/vis_data/scalars.json'))
        lines = [line for file in files for line in file.read_text().splitlines()]
        return [json.loads(line) for line in lines if line.endswith('}')]


def words(command: str, config: Path) -> list[str]:
    """A command with its config; STOCK is the train.py of the framework."""
    scope = read_config(config).default_scope
    values = dict(CONFIG=config, STOCK=stock_tool(scope, 'train'), FRAMEWORK=PACKAGES[scope])
    values = {word: str(value) for word, value in values.items()}
    found = [values.get(word, word) for word in command.split()]
    return [sys.executable, *(str(ROOT / w) if w.startswith('tools/') else w for w in found)]


def train_and_kill(command: list[str], folder: Path) -> str:
    """Train until there is a checkpoint, then kill all that was started; return its name."""
    pointer, log = folder / 'work/last_checkpoint', folder / 'killed.log'
    with log.open('w') as out:
        process = subprocess.Popen(
            command, cwd=folder, env=ENV, stdout=out, stderr=out, start_new_session=True
        )
    end = time.monotonic() + HOURS
    while not pointer.is_file():
        assert process.poll() is None, log.read_text()[-5000:]
        assert time.monotonic() < end, 'no checkpoint was written'
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return Path(pointer.read_text()).stem


@pytest.fixture(
    scope='module',
    params=[*WHOLE, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
)
def trip(request, tmp_path_factory) -> Trip:
    """Train, be killed, go on from the checkpoint to the end."""
    recipe = RECIPES[request.param]
    folder = tmp_path_factory.mktemp('journey')
    config = write_config(recipe, folder)
    command = [*words(recipe.train, config), '--work-dir', str(folder / 'work')]
    assert train_and_kill(command, folder) == f'{recipe.task.unit}_{HALF}'
    said = run([*command, '--resume'], folder)
    epoch, step = (HALF, 2 * HALF) if recipe.task.unit == 'epoch' else (0, HALF)
    assert f'resumed epoch: {epoch}, iter: {step}' in said
    return Trip(recipe, folder, config, Path((folder / 'work/last_checkpoint').read_text()))


def test_the_schedule_goes_on(trip):
    """Every iteration of both runs has the rate that the recipe's formula gives."""
    # Without groups of parameters only `lr` is logged.
    seen = {row['step']: row.get('base_lr', row['lr']) for row in trip.scalars() if 'lr' in row}
    highest = read_config(trip.config).optim_wrapper.optimizer.lr
    wanted = [highest * factor for factor in trip.recipe.task.factors]
    assert sorted(seen) == list(range(1, len(wanted) + 1))
    assert [seen[step] for step in sorted(seen)] == pytest.approx(wanted, rel=1e-4)


def test_decay_groups_are_resumed(trip):
    content = torch.load(trip.checkpoint, map_location='cpu', weights_only=False)
    decay = read_config(trip.config).optim_wrapper.optimizer.weight_decay
    groups = {group['weight_decay'] for group in content['optimizer']['param_groups']}
    # In pose all is decayed but the bias tables, which HRNet and ViT do not have.
    tables = any('bias_table' in name for name in content['state_dict'])
    assert groups == ({0.0, decay} if tables or trip.metric != 'coco/AP' else {decay})


@pytest.fixture(scope='module')
def metrics(trip) -> dict:
    """The metrics of the checkpoint by our tool; pose with the flip test of its recipe."""
    return trip.test('test', 'tools/test.py CONFIG', trip.checkpoint)


def test_metrics_are_those_of_the_last_validation(trip, metrics):
    (*_, last) = (row[trip.metric] for row in trip.scalars() if trip.metric in row)
    assert metrics[trip.metric] == pytest.approx(last, abs=1e-3)


@whole
def test_mim_gives_the_same(trip, metrics):
    """The framework's own test.py, which mim finds; it reads our checkpoint in its own way."""
    command = '-m mim test FRAMEWORK CONFIG --gpus 0 --checkpoint'
    assert trip.test('mim', command, trip.checkpoint) == pytest.approx(metrics, nan_ok=True)
    ours, theirs = trip.predictions('test'), trip.predictions('mim')
    assert ours.keys() == theirs.keys()
    for path, image in ours.items():
        for kind, values in image.items():
            np.testing.assert_array_equal(values, theirs[path][kind])


@pytest.mark.parametrize(
    'trip',
    [
        pytest.param(name, marks=[] if name in WHOLE else pytest.mark.slow)
        for name, recipe in RECIPES.items()
        if recipe.task.metric == 'mIoU'
    ],
    indirect=True,
)
def test_several_scales(trip):
    metrics = trip.test('tta', 'tools/test.py CONFIG', trip.checkpoint, '--tta')
    assert 0 <= metrics['mIoU'] <= 100  # two digits of hardly trained models


# ---------------------------------------------------------------- the checkpoint elsewhere


@whole
def test_inferencer(trip, metrics, tmp_path):
    """The predictions are those of the test, and there is a picture of each."""
    predictions = trip.predictions('test')
    inferencer = get_inferencer(trip.config, trip.checkpoint, device='cpu', show_progress=False)
    wanted = list(predictions.values())
    boxes = [np.array(image['boxes']) for image in wanted if 'boxes' in image] or None
    result = inferencer(list(predictions), boxes=boxes, out_dir=tmp_path)
    for got, image in zip(result['predictions'], wanted, strict=True):
        if 'scores' in image:
            np.testing.assert_allclose(got['pred_scores'], image['scores'], atol=1e-5)
        elif 'keypoints' in image:
            keypoints = [instance['keypoints'] for instance in got['instances']]
            np.testing.assert_allclose(keypoints, image['keypoints'], atol=1e-2)
        else:
            values, lengths = np.transpose(got['runs'])
            labels = np.repeat(values, lengths).reshape(got['size'])
            np.testing.assert_array_equal(labels, image['labels'])
    assert len(list((tmp_path / 'visualizations').iterdir())) == len(wanted)


@pytest.fixture(scope='module')
def photograph(trip) -> torch.Tensor:
    """A real photograph as the model sees it, normalized; (1, 3, H, W)."""
    size = {'accuracy/top1': (224, 224), 'coco/AP': (192, 256), 'mIoU': (256, 128)}[trip.metric]
    pixels = Image.fromarray(sklearn.datasets.load_sample_image('china.jpg')).resize(size)
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float()
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    return (image - mean) / std


@torch.no_grad()
def compute(model, image: torch.Tensor) -> torch.Tensor:
    """Logits of classes or pixels, or heatmaps."""
    out = model(image, None, mode='tensor')
    return out[-1] if isinstance(out, tuple | list) else out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


def call_tool(monkeypatch, name: str, *args: object) -> None:
    """Run a tool of ours in this process."""
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, args)])
    runpy.run_path(str(ROOT / f'tools/{name}.py'), run_name='__main__')


@whole
def test_folded(trip, photograph):
    model = trip.model()
    assert same(compute(fuse_for_inference(model), photograph), compute(model, photograph))


@whole
@pytest.mark.parametrize('target', ['official', 'mmpose'])
def test_converted_and_back(trip, target, photograph, tmp_path, monkeypatch):
    """To the names of another code, and back to ours in safetensors."""
    there, back = tmp_path / f'{target}.pth', tmp_path / f'{target}.safetensors'
    # mmpose's HRFormer has no other heads.
    part = target == 'mmpose' and trip.metric != 'coco/AP'
    options = ['--to', target, *(['--backbone-only'] if part else [])]
    call_tool(monkeypatch, 'convert_checkpoint', trip.checkpoint, there, *options)
    call_tool(monkeypatch, 'convert_checkpoint', there, back)
    ours = to_dialect(unwrap(read_checkpoint(trip.checkpoint)), 'mmhrformer', backbone_only=part)
    again = unwrap(read_checkpoint(back))
    assert ours.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())
    wanted = compute(trip.model(), photograph)
    for file in () if part else (there, back):
        assert torch.equal(compute(get_model(trip.config, file), photograph), wanted)


def other_classes(trip: Trip) -> dict:
    """Options for another number of classes or key points."""
    if trip.metric == 'accuracy/top1':
        return {'model.head.num_classes': 3}
    if trip.metric == 'coco/AP':
        return {'model.head.out_channels': 5}
    heads = read_config(trip.config).model.decode_head
    loss = dict(type='CrossEntropyLoss')
    return {'model.decode_head': [dict(head, num_classes=3, loss_decode=loss) for head in heads]}


@whole
@pytest.mark.parametrize('door', ['load_from', 'init_cfg'])
def test_another_window_and_other_classes(trip, door):
    """The scheme in a config of the user's own: all that fits is the same, tables are resized."""
    source, start = f'mmhrformer://{trip.checkpoint}', 'backbone.'
    options = {'model.backbone.window_size': 9, **other_classes(trip)}
    if door == 'init_cfg':
        init = dict(type='Pretrained', checkpoint=source, prefix=start)
        model = get_model(trip.config, cfg_options={**options, 'model.backbone.init_cfg': init})
        model.init_weights()
    else:
        model, start = get_model(trip.config, cfg_options=options), ''
        load_checkpoint(model, source, map_location='cpu')
    trained = trip.model().state_dict()
    for name, tensor in model.state_dict().items():
        if name.endswith('relative_position_bias_table'):
            assert len(tensor) == 17**2
            assert tensor.std() > 0
        elif name.startswith(start):
            fits = tensor.shape == trained[name].shape
            assert torch.equal(tensor, trained[name]) if fits else 'head' in name, name


@whole
def test_exported(trip, photograph, tmp_path, monkeypatch):
    """onnxruntime on a photograph gives what torch gives."""
    file = tmp_path / 'model.onnx'
    args = [trip.config, trip.checkpoint, '--out', file, '--size', *photograph.shape[2:]]
    call_tool(monkeypatch, 'export_onnx', *args)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    (out, *_) = session.run(None, {session.get_inputs()[0].name: photograph.numpy()})
    model = trip.model()
    wanted = compute(model, photograph)
    if trip.metric == 'accuracy/top1':
        wanted = wanted.softmax(1)
    if trip.metric == 'mIoU':
        wanted = torch.nn.functional.interpolate(
            wanted, photograph.shape[2:], mode='bilinear', align_corners=model.align_corners
        )
    assert same(torch.from_numpy(out), wanted)

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
from dataclasses import dataclass
from pathlib import Path

import cv2
import mmcv
import numpy as np
import onnxruntime
import pytest
import sklearn.datasets
import torch
import torch.nn.functional as F
from matplotlib.cbook import get_sample_data
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from PIL import Image
from places import ENV, ROOT, run
from recipes import MICRO, RECIPES, WHOLE, Recipe, write_config

from mmhrformer import fuse_for_inference, get_inferencer, get_model
from mmhrformer.checkpoints import load_checkpoint, read_checkpoint, to_dialect, unwrap
from mmhrformer.checkpoints.dialects import BIAS_TABLE, resize_bias_table
from mmhrformer.cli.launch import stock_tool
from mmhrformer.configs import PACKAGES, read_config

pytestmark = pytest.mark.e2e

HALF = 2  # epochs or iterations after which a run is killed


def trips(recipes: dict[str, Recipe]) -> list:
    """Parameters of a test for some recipes, slow ones marked."""
    return [
        pytest.param(name, marks=pytest.mark.slow if recipe.slow else [])
        for name, recipe in recipes.items()
    ]


# To go on from a checkpoint to its use, only for few recipes of each task.
whole = pytest.mark.parametrize('trip', trips(WHOLE), indirect=True)


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
        options = [f'test_evaluator.1.out_file_path={name}.pkl']
        if self.metric == 'mIoU':
            options.append(f'test_evaluator.0.output_dir={name}.labels')
        args = (*args, '--work-dir', name, '--cfg-options', *options)
        run([*words(command, self.config), *map(str, args)], self.folder)
        (results,) = (self.folder / name).glob('*/*.json')
        found = json.loads(results.read_text())
        return {key: value for key, value in found.items() if not key.endswith('time')}

    def predictions(self, name: str = 'val') -> list[dict]:
        """What a test, or by default the last validation, predicted for each image or person."""
        samples = pickle.loads((self.folder / f'{name}.pkl').read_bytes())
        return [predicted(sample, self.folder) for sample in samples]

    def scalars(self) -> list[dict]:
        """Losses, rates and metrics that both runs logged, the last lines possibly cut off."""
        files = sorted(self.folder.glob('work/*/vis_data/scalars.json'))
        lines = [line for file in files for line in file.read_text().splitlines()]
        return [json.loads(line) for line in lines if line.endswith('}')]


def predicted(sample: dict, folder: Path) -> dict:
    """Path of the image, and scores of classes, label map, key points of a person, or objects."""
    found = dict(path=str(folder / sample['img_path']))
    if 'pred_score' in sample:
        return dict(found, scores=sample['pred_score'])
    if 'seg_logits' in sample:
        (labels,) = sample['pred_sem_seg']['data']
        return dict(found, logits=sample['seg_logits']['data'], labels=labels)
    if 'keypoints' in sample['pred_instances']:
        found['box'] = sample['gt_instances']['bboxes'][0]
    return dict(found, **sample['pred_instances'])


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) > 1
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for kind, values in one.items():
            np.testing.assert_array_equal(values, two[kind], err_msg=kind)


def words(command: str, config: Path) -> list[str]:
    """A command with its config; STOCK is the train.py of the framework."""
    scope = read_config(config).default_scope
    values = dict(CONFIG=config, STOCK=stock_tool(scope, 'train'), FRAMEWORK=PACKAGES[scope])
    values = {word: str(value) for word, value in values.items()}
    found = [values.get(word, word) for word in command.split()]
    return [sys.executable, *(str(ROOT / w) if w.startswith('tools/') else w for w in found)]


@pytest.fixture(scope='module', params=trips(RECIPES))
def trip(request, tmp_path_factory) -> Trip:
    """Train, be killed at the first checkpoint, go on from it to the end."""
    recipe = RECIPES[request.param]
    folder = tmp_path_factory.mktemp('journey')
    config = write_config(recipe, folder)
    command = [*words(recipe.train, config), '--work-dir', str(folder / 'work')]
    first = [str(folder / 'killed.py') if word == str(config) else word for word in command]
    paths = [str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]
    env = dict(ENV, PYTHONPATH=os.pathsep.join(filter(None, paths)))
    killed = subprocess.run(
        first, cwd=folder, env=env, capture_output=True, text=True, start_new_session=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stdout[-5000:] + killed.stderr[-5000:]
    pointer = folder / 'work/last_checkpoint'
    assert Path(pointer.read_text()).stem == f'{recipe.task.unit}_{HALF}'
    said = run([*command, '--resume'], folder)
    epoch, step = (HALF, 2 * HALF) if recipe.task.unit == 'epoch' else (0, HALF)
    assert f'resumed epoch: {epoch}, iter: {step}' in said
    return Trip(recipe, folder, config, Path(pointer.read_text()))


def test_the_schedule_goes_on(trip):
    """Every iteration of both runs has the rate that the recipe's formula gives."""
    # Without groups of parameters only `lr` is logged.
    seen = {row['step']: row.get('base_lr', row['lr']) for row in trip.scalars() if 'lr' in row}
    highest = read_config(trip.config).optim_wrapper.optimizer.lr
    wanted = [highest * factor for factor in trip.recipe.task.factors]
    assert sorted(seen) == list(range(1, len(wanted) + 1))
    assert [seen[step] for step in sorted(seen)] == pytest.approx(wanted, rel=1e-4)


def test_weights_and_optimizer_are_resumed(trip):
    """All count the steps of both runs, and the decay groups are those of the config."""
    content = torch.load(trip.checkpoint, map_location='cpu', weights_only=False)
    steps = len(trip.recipe.task.factors)
    counters = [v for k, v in content['state_dict'].items() if k.endswith('num_batches_tracked')]
    assert all(counter == steps for counter in counters)
    states = content['optimizer']['state'].values()
    assert {int(state['step']) for state in states} == {steps}
    assert all(state['exp_avg'].any() and state['exp_avg_sq'].any() for state in states)
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
    """So are the predictions: most metrics of hardly trained models are 0."""
    (*_, last) = (row for row in trip.scalars() if trip.metric in row)
    assert trip.metric in metrics
    assert metrics == pytest.approx({name: last[name] for name in metrics}, nan_ok=True)
    assert_same(trip.predictions('test'), trip.predictions())


@whole
def test_mim_gives_the_same(trip, metrics):
    """The framework's own test.py, which mim finds; it reads our checkpoint in its own way."""
    command = '-m mim test FRAMEWORK CONFIG --gpus 0 --checkpoint'
    assert trip.test('mim', command, trip.checkpoint) == pytest.approx(metrics, nan_ok=True)
    assert_same(trip.predictions('mim'), trip.predictions('test'))


SEGMENTATION = {name: recipe for name, recipe in RECIPES.items() if recipe.task.metric == 'mIoU'}


def resize(model, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(logits, size, mode='bilinear', align_corners=model.align_corners)


def segment(model, image: torch.Tensor) -> torch.Tensor:
    """Logits at the size of an image, which is padded if the config says so (ADE20K)."""
    height, width = image.shape[2:]
    divisor = (model.data_preprocessor.test_cfg or {}).get('size_divisor', 1)
    padded = F.pad(image, (0, -width % divisor, 0, -height % divisor))
    return resize(model, compute(model, padded), padded.shape[2:])[..., :height, :width]


@pytest.mark.parametrize('trip', trips(SEGMENTATION), indirect=True)
def test_several_scales(trip):
    """The logits of all scales and their mirror images, summed at the original size.

    Label maps would not do: those of hardly trained models have one label.
    """
    trip.test('tta', 'tools/test.py CONFIG', trip.checkpoint, '--tta')
    found, single = trip.predictions('tta')[0], trip.predictions()[0]
    model, total = get_model(trip.config), 0
    # Not by `get_model`, which refuses the checkpoints of HRNets.
    content = torch.load(trip.checkpoint, map_location='cpu', weights_only=False)
    model.load_state_dict(content['state_dict'])
    image = cv2.imread(found['path'])
    original = image.shape[:2]
    _, *first, augment = read_config(trip.config).tta_pipeline
    for step in first:  # to a shorter side of 520
        image = mmcv.imrescale(image, step.scale, interpolation=step.interpolation)
    ratios = [step.scale_factor for step in augment.transforms[0]]
    for ratio in ratios:
        width, height = (int(side * ratio + 0.5) for side in image.shape[1::-1])
        scaled = normalize(mmcv.imrescale(image, (width, height)))
        for mirror in (lambda x: x, lambda x: x.flip(3)):
            out = segment(model, mirror(scaled))
            total += resize(model, mirror(out), original)[0]
    assert same(total, found['logits'])
    assert torch.equal(found['labels'], found['logits'].argmax(0))
    assert not same(found['logits'] / (2 * len(ratios)), single['logits'])
    written = np.array(Image.open(trip.folder / 'tta.labels' / f'{Path(found["path"]).stem}.png'))
    is_reduced = trip.recipe.data != 'cityscapes'  # its files have 0 for no class
    np.testing.assert_array_equal(written, found['labels'] + is_reduced)


# ---------------------------------------------------------------- the checkpoint elsewhere


@whole
def test_inferencer(trip, metrics, tmp_path):
    """The predictions are those of the test, and there is a picture of each."""
    images: dict[str, list[dict]] = {}
    for sample in trip.predictions('test'):
        images.setdefault(sample['path'], []).append(sample)
    people = trip.metric == 'coco/AP'
    options = {}
    if people:  # key points are drawn whatever their scores
        boxes = [[person['box'] for person in samples] for samples in images.values()]
        options = dict(boxes=boxes, kpt_thr=0)
    inferencer = get_inferencer(trip.config, trip.checkpoint, device='cpu', show_progress=False)
    options.update(out_dir=tmp_path, return_vis=True, return_datasamples=True)
    result = inferencer(list(images), **options)
    parts = (result[key] for key in ('predictions', 'data_samples', 'visualization'))
    for got, sample, drawn, (path, wanted) in zip(*parts, images.items(), strict=True):
        if 'scores' in wanted[0]:
            np.testing.assert_allclose(got['pred_scores'], wanted[0]['scores'], atol=1e-7)
        elif people:
            instances = sample.pred_instances
            for kind, atol in (('keypoints', 1e-2), ('keypoint_scores', 1e-6)):
                values = [person[kind][0] for person in wanted]
                np.testing.assert_allclose(instances[kind], values, atol=atol)
        else:
            assert same(sample.seg_logits.data, wanted[0]['logits'])
            np.testing.assert_array_equal(inferencer.label_map(got), wanted[0]['labels'])
        image, written = (
            cv2.imread(str(file))[..., ::-1].astype(int)
            for file in (path, tmp_path / f'visualizations/{Path(path).stem}.jpg')
        )
        assert (abs(drawn - image) > 64).sum() > 10
        assert abs(written - drawn).mean() < abs(written - image).mean()
    assert len(list((tmp_path / 'visualizations').iterdir())) == len(images)


@pytest.mark.parametrize('trip', ['pose'], indirect=True)
def test_the_image_is_flipped_too(trip):
    """The key points of the test are not those without its flip test."""
    (first, *_) = trip.predictions()
    flips = {'model.test_cfg.flip_test': False}
    inferencer = get_inferencer(trip.config, trip.checkpoint, device='cpu', cfg_options=flips)
    (found,) = inferencer(first['path'], boxes=[first['box']])['predictions']
    (person,) = found['instances']
    assert not np.allclose(person['keypoints'], first['keypoints'][0], atol=1)


def normalize(pixels: np.ndarray) -> torch.Tensor:
    """An image as the models see it, (1, 3, H, W)."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    return (image - mean) / std


@pytest.fixture(scope='module')
def photograph(trip) -> torch.Tensor:
    """A real photograph, for poses of a person; (1, 3, H, W)."""
    pixels = sklearn.datasets.load_sample_image('china.jpg')
    if trip.metric == 'coco/AP':
        with get_sample_data('grace_hopper.jpg') as file:
            pixels = np.array(Image.open(file))
    return normalize(cv2.resize(pixels, trip.recipe.task.size[::-1]))


@torch.no_grad()
def compute(model, image: torch.Tensor) -> torch.Tensor:
    """Logits of classes or pixels, or heatmaps."""
    out = model(image, None, mode='tensor')
    return out[-1] if isinstance(out, tuple | list) else out


@torch.no_grad()
def features(backbone, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return backbone(image)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


def equal(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


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
    trained = trip.model()
    wanted = compute(trained, photograph)
    for file in (there, back):
        if part:
            model = get_model(trip.config)
            load_checkpoint(model.backbone, file, strict=True)
            streams = features(model.backbone, photograph)
            assert equal(streams, features(trained.backbone, photograph))
        else:
            assert torch.equal(compute(get_model(trip.config, file), photograph), wanted)
    if target == 'mmpose' and not part:
        model = mmpose_model()
        model.load_state_dict(torch.load(there)['state_dict'])
        assert same(compute(model, photograph), wanted)


def mmpose_model() -> torch.nn.Module:
    """The pose estimator of mmpose's own config, as small as ours."""
    import mmpose

    folder = Path(mmpose.__file__).parent / '.mim/configs/body_2d_keypoint/topdown_heatmap/coco'
    cfg = Config.fromfile(folder / 'td-hm_hrformer-small_8xb32-210e_coco-256x192.py').model
    del cfg.backbone['init_cfg']
    for i, modules in enumerate(MICRO['num_modules'], 2):
        cfg.backbone.extra[f'stage{i}'].update(
            num_modules=modules,
            num_blocks=(MICRO['num_blocks'],) * i,
            num_channels=MICRO['channels'][:i],
            num_heads=MICRO['num_heads'][:i],
        )
    cfg.head.in_channels = MICRO['channels'][0]
    with DefaultScope.overwrite_default_scope('mmpose'):
        model = revert_sync_batchnorm(MODELS.build(cfg))
    model.train(False)  # eval() does not return the model
    return model


def other_classes(cfg: Config) -> dict:
    """Options for three classes or key points."""
    if cfg.default_scope == 'mmpretrain':
        return {'model.head.num_classes': 3}
    if cfg.default_scope == 'mmpose':
        return {'model.head.out_channels': 3}
    loss = dict(type='CrossEntropyLoss')
    heads = [dict(head, num_classes=3, loss_decode=loss) for head in cfg.model.decode_head]
    return {'model.decode_head': heads}


@whole
@pytest.mark.parametrize('door', ['load_from', 'init_cfg'])
@pytest.mark.parametrize('window', [7, 9])
def test_other_classes_and_windows(trip, door, window, photograph, monkeypatch):
    """The scheme in a config of the user's own: what fits is loaded, and tables are resized."""
    source = f'mmhrformer://{trip.checkpoint}'
    cfg = read_config(trip.config)
    cfg.merge_from_dict({'model.backbone.window_size': window, **other_classes(cfg)})
    if door == 'init_cfg':
        init = dict(type='Pretrained', checkpoint=source, prefix='backbone.')
        cfg.model.backbone.init_cfg = init
        model, loaded = get_model(cfg), 'backbone.'
        model.init_weights()
    else:
        cfg.load_from, cfg.work_dir = source, 'other'
        monkeypatch.chdir(trip.folder)
        runner = Runner.from_cfg(cfg)
        runner.load_or_resume()
        model, loaded = runner.model, ''
        model.train(False)
    trained = trip.model()
    wanted, found = trained.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    new = {name for name in found if 'head' in name and found[name].shape != wanted[name].shape}
    assert {len(found[name]) for name in new} == {3}
    for name in found.keys() - new:
        if name.endswith(BIAS_TABLE):
            assert torch.equal(found[name], resize_bias_table(wanted[name], window))
        elif name.startswith(loaded):
            assert torch.equal(found[name], wanted[name]), name
    if window == 7:
        streams = features(model.backbone, photograph)
        assert equal(streams, features(trained.backbone, photograph))


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
        wanted = resize(model, wanted, photograph.shape[2:])
    assert same(torch.from_numpy(out), wanted)

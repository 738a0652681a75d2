"""Every shipped config builds the official model, trains a step and predicts on made-up data."""

from __future__ import annotations

import re

import golden
import pytest
import torch
from needs import may_need
from training_steps import count_parameters, prepare, shrink, train_and_predict

from mmhrformer.configs import config_root

pytestmark = may_need('mmpose', 'mmseg')

PARAMETERS = golden.read_json('params_flops.json')['parameters']
CLASSES = {'cityscapes': 19, 'pascal-context-59': 59, 'coco-stuff10k': 171, 'ade20k': 150}


def official_parameters(name: str) -> int:
    """Parameters of the official model that a config builds."""
    arch, window = re.search(r'hrformer-(tiny|small|base)(?:-w(\d+))?_', name).groups()
    if name.startswith('hrformer-'):
        return PARAMETERS[f'cls {arch}']['total']
    if name.startswith('td-hm'):
        return PARAMETERS[f'pose {arch}']['total']
    (classes,) = (number for data, number in CLASSES.items() if data in name)
    # Two classifiers of 512 channels and a bias, counted with 19 classes.
    total = PARAMETERS[f'seg {arch} w{window or 7} 19cls']['total']
    return total + 2 * (classes - 19) * (512 + 1)


# Those of the ablations: test_ablations.py; of detection: test_detection.py.
ALL = {
    path.stem: path
    for path in sorted(config_root().glob('[!_]*/*.py'))
    if path.parent.name not in ('ablations', 'hrformer_det')
}
SHIPPED = [name for name, path in ALL.items() if path.parent.name != 'demo']
# Configs that take a step in `make test`: every task, each loss, both sides of what varies.
STEPPED = [
    *(name for name in ALL if name not in SHIPPED),
    'hrformer-tiny_8xb128_in1k',
    'hrformer-base_32xb32_in1k',
    'td-hm_hrformer-small_8xb32-210e_coco-256x192',
    'td-hm_hrformer-base_8xb8-210e_coco-384x288',
    'ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024',
    'ocrnet_hrformer-base-w15_8xb2-60k_pascal-context-59-520x520',
    'ocrnet_hrformer-base-w13_8xb2-150k_ade20k-520x520',
]
# What may differ between two configs of a task of which one takes a step for both.
VARYING = {'arch', 'drop_path_rate', 'window_size', 'checkpoint', 'in_channels', 'num_classes',
           'class_weight', 'size', 'input_size', 'heatmap_size', 'sigma'}  # fmt: skip


@pytest.mark.parametrize('name', SHIPPED)
def test_parameters_are_those_of_the_official_model(name):
    assert count_parameters(golden.read_config(ALL[name])) == official_parameters(name)


@pytest.mark.parametrize('name', STEPPED)
def test_training_step_and_prediction(name):
    cfg = golden.read_config(ALL[name])
    if name in SHIPPED:
        shrink(cfg)
    torch.manual_seed(0)
    train_and_predict(prepare(cfg))


def common(options):
    """Options without those that may vary."""
    if isinstance(options, dict):
        return {key: common(value) for key, value in options.items() if key not in VARYING}
    return [common(value) for value in options] if isinstance(options, (list, tuple)) else options


def parts_of_a_step(name: str) -> list:
    cfg = golden.read_config(ALL[name]).to_dict()
    return [common(cfg.get(key)) for key in ('model', 'optim_wrapper', 'data_preprocessor')]


@pytest.mark.parametrize('name', SHIPPED)
def test_a_config_like_it_takes_a_step(name):
    alike = [other for other in STEPPED if ALL[other].parent == ALL[name].parent]
    assert parts_of_a_step(name) in [parts_of_a_step(other) for other in alike]


@pytest.mark.slow
@pytest.mark.parametrize('name', SHIPPED)
def test_training_step_and_prediction_in_full_size(name):
    torch.manual_seed(0)
    train_and_predict(prepare(golden.read_config(ALL[name])))

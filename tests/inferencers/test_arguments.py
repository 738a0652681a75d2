"""Invalid arguments: the message names the remedy."""

from __future__ import annotations

import copy
from pathlib import Path

import golden
import pytest
import torch
from inference_samples import CONFIGS, make_image

from mmhrformer import get_inferencer, inference
from mmhrformer.configs import find_config, read_config


def test_precision_and_device_that_cannot_be():
    for options, message in (
        (dict(dtype='float8'), r"dtype='float8': choose one of"),
        (dict(device='cuda:99'), r"device='cuda:99'.*Choose an available device"),
        (dict(device='nowhere'), r"device='nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            get_inferencer(CONFIGS['cls'], False, **{'device': 'cpu', **options})


def test_autocast_of_float16_is_refused_where_torch_would_ignore_it():
    try:
        with torch.autocast('cpu', torch.float16):
            possible = torch.is_autocast_cpu_enabled()
    except RuntimeError:
        possible = False
    if possible:
        half = get_inferencer(CONFIGS['cls'], False, device='cpu', dtype='float16')
        assert half.autocast == torch.float16
        return
    with pytest.raises(
        ValueError, match=r"dtype='float16': torch .* does not support it on device='cpu'"
    ):
        get_inferencer(CONFIGS['cls'], False, device='cpu', dtype='float16')


def test_other_arguments_that_cannot_be(models, tmp_path):
    (tmp_path / 'file').touch()
    for options, message in (
        (dict(batch_size=0), 'batch_size=0: expected a positive integer'),
        (dict(batch_size=1.5), 'batch_size=1.5'),
        (dict(batch_size=True), 'batch_size=True'),
        (dict(min_side=256), 'min_side=256: no such argument. Drawing options of this task are'),
        (dict(out_dir=tmp_path / 'file'), r'out_dir=.*file.*Choose a writable folder'),
    ):
        with pytest.raises(ValueError, match=message):
            models['cls'](make_image(), **options)


def test_models_tasks_and_checkpoints_that_cannot_be(tmp_path):
    file = tmp_path / 'official.pth'
    torch.save(golden.official_checkpoint('pose', 'keys_pose_tiny.json'), file)
    cls = CONFIGS['cls']
    for model, checkpoint, task, kind, message in (
        ('hrformer-tny_8xb128_in1k', True, None, FileNotFoundError, 'did you mean'),
        (cls, False, 'sge', ValueError, "task='sge': choose.*did you mean seg"),
        (cls, False, 'seg', ValueError, "is for task='cls', not 'seg'"),
        (cls, True, None, ValueError, 'checkpoint=True: .* is not a model of the zoo'),
        (cls, '', None, ValueError, "checkpoint='': expected the path of a file"),
        (cls, None, None, ValueError, 'checkpoint=None: expected the path of a file'),
        (cls, 'no.pth', None, FileNotFoundError, "no checkpoint 'no.pth'"),
        (cls, file, None, RuntimeError, r'official\.pth.*checkpoint'),
    ):
        with pytest.raises(kind, match=message):
            inference(model, make_image(), checkpoint, task=task, device='cpu')


def test_configs_that_do_not_tell_enough(tmp_path):
    text = find_config(CONFIGS['cls']).read_text().replace('../_base_', f'{base()}/_base_')
    for added, message in (
        ('test_dataloader = dict(_delete_=True)', 'has no test_dataloader.dataset.pipeline'),
        ("default_scope = 'mmdet'", "default_scope is 'mmdet'; expected a config of one of"),
    ):
        path = tmp_path / 'mine.py'
        path.write_text(f'{text}\n{added}\n')
        with pytest.raises(ValueError, match=message):
            get_inferencer(path, False, device='cpu')


def test_augmented_tests_are_refused():
    cfg = read_config(find_config(CONFIGS['cls']))
    pipeline = [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=[])]
    inner = dict(type='ConcatDataset', datasets=[dict(type='CustomDataset', pipeline=pipeline)])
    model = dict(type='AverageClsScoreTTA', module=cfg.model)
    for options, kind in (
        ({'test_dataloader.dataset.pipeline': pipeline}, 'TestTimeAug'),
        ({'test_dataloader.dataset': dict(inner, _delete_=True)}, 'TestTimeAug'),
        ({'model': dict(model, type='mmhrformer.SumLogitsTTAModel')}, 'SumLogitsTTAModel'),
    ):
        augmented = copy.deepcopy(cfg)
        augmented.merge_from_dict(options)
        with pytest.raises(ValueError, match=f'has {kind}: .* Use the config that the model was'):
            get_inferencer(augmented, False, device='cpu')


def base() -> Path:
    return find_config(CONFIGS['cls']).parents[1]

"""Classification: names of classes."""

from __future__ import annotations

import pytest
import torch
from inference_samples import CONFIGS, make_image

from mmhrformer import get_inferencer, inference
from mmhrformer.configs import find_config, read_config
from mmhrformer.datasets.meta import find_classes


def test_classes_come_from_the_config_or_the_checkpoint(models, tmp_path):
    assert models['seg'].dataset_meta['classes'][:2] == ('sky', 'mountain')
    assert models['seg'].dataset_meta['palette'][0] == [135, 190, 235]
    assert models['cls'].dataset_meta['classes'] is None
    names = tuple('abcdefghij')
    file = tmp_path / 'digits.pth'
    meta = dict(dataset_meta=dict(classes=names))
    torch.save(dict(state_dict=models['cls'].model.state_dict(), meta=meta), file)
    (one,) = inference(CONFIGS['cls'], make_image(), file, device='cpu')['predictions']
    assert one['pred_class'] == names[one['pred_label']]
    assert one['pred_scores'][one['pred_label']] == one['pred_score'] == max(one['pred_scores'])
    cfg = read_config(find_config('ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024'))
    cfg.test_dataloader.dataset.type = 'mmseg.CityscapesDataset'
    classes, palette = find_classes(cfg, 19, {})
    assert (classes[0], palette[0]) == ('road', [128, 64, 128])
    assert find_classes(cfg, 18, meta['dataset_meta']) == (None, None)  # of neither


def test_heads_without_classes():
    task = dict(type='LinearClsHead', num_classes=3, in_channels=256)
    options = dict(_delete_=True, type='MultiTaskHead', task_heads=dict(a=task, b=task))
    with pytest.raises(ValueError, match="type='MultiTaskHead': ClsInferencer supports only heads"):
        get_inferencer(CONFIGS['cls'], False, cfg_options={'model.head': options}, device='cpu')

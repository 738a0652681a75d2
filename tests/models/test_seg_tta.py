"""Predictions at several scales, merged as the official code does."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData

from mmhrformer.configs import find_config

pytest.importorskip('mmseg')


class Model(BaseModel):
    """A segmentor that nobody asks for anything."""

    out_channels = 2

    def forward(self, inputs, data_samples=None, mode='tensor'):
        raise NotImplementedError


def sample(logits: torch.Tensor, labels: torch.Tensor | None = None):
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=dict(img_path='a.png'))
    sample.seg_logits = PixelData(data=logits)
    sample.pred_sem_seg = PixelData(data=logits.argmax(0, keepdim=True))
    if labels is not None:
        sample.gt_sem_seg = PixelData(data=labels)
    return sample


def build():
    cfg = Config.fromfile(find_config('ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024'))
    with DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(dict(**cfg.tta_model, module=Model()))


def test_logits_are_added():
    torch.manual_seed(0)
    logits = [torch.randn(5, 6, 7) for _ in range(3)]
    labels = torch.zeros(1, 6, 7)
    (merged,) = build().merge_preds([[sample(x, labels) for x in logits]])
    assert torch.allclose(merged.seg_logits.data, sum(logits))
    assert torch.equal(merged.pred_sem_seg.data, sum(logits).argmax(0, keepdim=True))
    assert merged.gt_sem_seg.data is labels
    assert merged.img_path == 'a.png'


def test_a_confident_prediction_outweighs_more_hesitant_ones():
    """With averaged probabilities it could not: that is the difference from mmseg."""
    sure = torch.tensor([20.0, 0.0]).reshape(2, 1, 1)
    hesitant = torch.tensor([0.0, 3.0]).reshape(2, 1, 1)
    from mmseg.models import SegTTAModel

    ours = build()
    (merged,) = ours.merge_preds([[sample(sure), sample(hesitant), sample(hesitant)]])
    assert merged.pred_sem_seg.data.item() == 0
    samples = [[sample(sure), sample(hesitant), sample(hesitant)]]
    (stock,) = SegTTAModel.merge_preds(ours, samples)
    assert stock.pred_sem_seg.data.item() == 1


@pytest.mark.parametrize('threshold', [0.3, 0.5])
def test_models_with_one_channel_are_asked_for_their_threshold(threshold):
    """Their predictions hold probabilities, 0 and 1 among them; the labels are floats in mmseg."""
    model = build()
    model.module.decode_head = torch.nn.Module()
    model.module.decode_head.threshold = threshold
    logits = [torch.tensor(x).view(1, 1, -1) for x in ([-99.0, -1.0, 0.2, 99.0], [-3.0, 0.5, 0, 0])]
    (alone,) = model.merge_preds([[sample(logits[0].sigmoid())]])
    torch.testing.assert_close(alone.seg_logits.data, logits[0].sigmoid(), atol=1e-6, rtol=0)
    assert torch.equal(alone.pred_sem_seg.data, (logits[0].sigmoid() > threshold).float())
    (merged,) = model.merge_preds([[sample(x.sigmoid()) for x in logits]])
    expected = (sum(logits) / 2).sigmoid()
    torch.testing.assert_close(merged.seg_logits.data, expected, atol=1e-3, rtol=0)
    assert torch.equal(merged.pred_sem_seg.data, (expected > threshold).float())

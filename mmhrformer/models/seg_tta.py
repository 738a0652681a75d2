"""Test-time augmentation of the official segmentation code."""

from __future__ import annotations

import torch
from mmengine.structures import PixelData
from mmseg.models import SegTTAModel
from mmseg.structures import SegDataSample

from ..registry import MODELS


@MODELS.register_module()
class SumLogitsTTAModel(SegTTAModel):
    """Adds the logits of all scales and flips, as the official code does.

    mmseg's own averages their probabilities. The results with several scales that the paper
    reports come from sums of logits.

    Args:
        module (dict | nn.Module): The segmentor; the stock test tool puts the model of the config
            here.
    """

    def merge_preds(self, data_samples_list: list[list[SegDataSample]]) -> list[SegDataSample]:
        """Merge the predictions for each image.

        Args:
            data_samples_list (list[list[SegDataSample]]): For each image its predictions, with
                logits (classes, H, W) of the original size.

        Returns:
            list[SegDataSample]: For each image the first prediction, with the merged logits and
            labels instead of its own.
        """
        merged = []
        for samples in data_samples_list:
            logits = torch.stack([sample.seg_logits.data for sample in samples]).sum(0)
            sample = samples[0]
            sample.seg_logits = PixelData(data=logits)
            sample.pred_sem_seg = PixelData(data=logits.argmax(dim=0, keepdim=True))
            merged.append(sample)
        return merged

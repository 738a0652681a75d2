"""Test-time augmentation of the official segmentation code."""

from __future__ import annotations

import torch
from mmengine.structures import PixelData
from mmseg.models import SegTTAModel
from mmseg.structures import SegDataSample

from ..registry import MODELS


@MODELS.register_module()
class SumLogitsTTAModel(SegTTAModel):
    """Sum of the logits of all scales and flips, as in the official code.

    mmseg's own model averages probabilities. The results with several scales in the paper come
    from sums of logits. Models with one channel (``out_channels=1``) predict its probability;
    their threshold is for the mean of the logits.

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
            scores = torch.stack([sample.seg_logits.data for sample in samples])
            if scores.shape[1] == 1:
                # Probabilities of 0 and 1 have logits again, as far as the numbers tell.
                scores = scores.logit(eps=torch.finfo(scores.dtype).eps).mean(0).sigmoid()
                labels = (scores > self.module.decode_head.threshold).to(scores)
            else:
                scores = scores.sum(0)
                labels = scores.argmax(dim=0, keepdim=True)
            sample = samples[0]
            sample.seg_logits = PixelData(data=scores)
            sample.pred_sem_seg = PixelData(data=labels)
            merged.append(sample)
        return merged

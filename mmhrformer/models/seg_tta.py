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

    mmseg's own model averages probabilities, but the multi-scale results in the paper come from
    sums of logits. Models with one channel (``out_channels=1``) predict its probability, from the
    mean of the logits, which their threshold applies to.

    Args:
        module (dict | nn.Module): The segmentor; the stock test tool passes the config's model.
    """

    def merge_preds(self, data_samples_list: list[list[SegDataSample]]) -> list[SegDataSample]:
        """Merge the predictions of each image.

        Args:
            data_samples_list (list[list[SegDataSample]]): The predictions of each image, with
                logits (classes, H, W) at the original size.

        Returns:
            list[SegDataSample]: For each image the first prediction, with the merged logits and
            labels instead of its own.
        """
        merged = []
        for samples in data_samples_list:
            scores = torch.stack([sample.seg_logits.data for sample in samples])
            if scores.shape[1] == 1:
                # Back to logits, clamped for probabilities of 0 and 1.
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

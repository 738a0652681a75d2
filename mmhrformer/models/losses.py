"""The segmentation losses of the official HRFormer code, for mmseg's decode heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from ..registry import MODELS


def is_weight(value: Any) -> bool:
    """Whether a value is a number from 0 on."""
    return isinstance(value, Real) and 0 <= value < math.inf


@MODELS.register_module()
class WeightedCrossEntropyLoss(nn.Module):
    """Cross entropy, averaged over the labelled pixels by their class weights.

    mmseg's own loss cannot be used with class weights when a label is ignored: it looks the
    weight of class 255 up.

    Args:
        class_weight (Sequence[float], optional): Weight of each class. Defaults to None: 1.
        loss_weight (float): Weight of the loss. Defaults to 1.
        loss_name (str): Name in the log; only names that begin with ``loss_`` are optimized.
            Defaults to ``'loss_ce'``.

    Raises:
        ValueError: If a weight is not possible.

    Examples:
        >>> loss = WeightedCrossEntropyLoss(class_weight=[1., 2.])
        >>> label = torch.tensor([[[0, 1, 255, 1]]])
        >>> round(loss(torch.zeros(1, 2, 1, 4), label, ignore_index=255).item(), 4)
        0.6931
    """

    def __init__(
        self,
        class_weight: Sequence[float] | None = None,
        loss_weight: float = 1.0,
        loss_name: str = 'loss_ce',
    ) -> None:
        super().__init__()
        if not is_weight(loss_weight):
            raise ValueError(f'loss_weight={loss_weight!r}: give a number from 0 on')
        if not isinstance(class_weight, Sequence | None) or not all(
            map(is_weight, class_weight or ())
        ):
            raise ValueError(
                f'class_weight={class_weight!r}: give a number from 0 on for each class, or None'
            )
        self.loss_weight = loss_weight
        self.loss_name = loss_name
        weight = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float)
        self.register_buffer('class_weight', weight, persistent=False)
        self._told_all_ignored = False

    def forward(
        self,
        logits: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = 255,
    ) -> Tensor:
        """Compute the loss.

        Args:
            logits (Tensor): Class scores of shape (B, classes, H, W).
            label (Tensor): Class indices of shape (B, H, W), int64.
            weight (Tensor, optional): Must be None; the place where mmseg passes the result of
                a pixel sampler.
            ignore_index (int): Label of pixels that do not count. Defaults to 255.

        Returns:
            Tensor: The loss, a scalar; 0 if every pixel is ignored.

        Raises:
            ValueError: If a pixel sampler is used, the class weights are not as many as the
                classes, or labels are not of the shape of the logits, not int64, or no class.
        """
        name = type(self).__name__
        if weight is not None:
            raise ValueError(f"{name} takes no pixel weights: remove the decode head's sampler")
        if self.class_weight is not None and len(self.class_weight) != logits.shape[1]:
            raise ValueError(
                f'{name}: class_weight has {len(self.class_weight)} numbers, the head '
                f'{logits.shape[1]} classes'
            )
        if self._check_labels(logits, label, ignore_index):
            return self.loss_weight * self._loss(logits, label, ignore_index)
        if not self._told_all_ignored:
            self._told_all_ignored = True
            print_log(
                f'{name}: every pixel of a batch is ignored (label {ignore_index}), its loss '
                'is 0. Check the labels if this happens often; it is said only once.',
                'current',
            )
        return logits.sum() * 0

    def _check_labels(self, logits: Tensor, label: Tensor, ignore_index: int) -> bool:
        """Refuse labels that are none; return whether any pixel counts."""
        name, classes = type(self).__name__, logits.shape[1]
        shape = (len(logits), *logits.shape[2:])
        if label.shape != shape or label.dtype != torch.long:
            raise ValueError(
                f'{name} got labels of shape {tuple(label.shape)} and {label.dtype} for logits of '
                f'shape {tuple(logits.shape)}: give class indices of shape {tuple(shape)}, '
                'torch.int64'
            )
        counts = label != ignore_index
        wrong = counts & ((label < 0) | (label >= classes))
        # A GPU would stop the program at the first wrong index, without saying which. Both
        # questions are asked at once, since each answer waits for it.
        any_wrong, any_counts = torch.stack([wrong.any(), counts.any()]).tolist()
        if any_wrong:
            raise ValueError(
                f'{name} got the labels {label[wrong].unique()[:5].tolist()}, which are neither a '
                f'class (0 to {classes - 1}, as num_classes={classes}) nor ignore_index='
                f"{ignore_index}: correct the label maps, the data set's reduce_zero_label, or "
                'num_classes of the head'
            )
        return any_counts

    def _class_weight(self, logits: Tensor) -> Tensor | None:
        return None if self.class_weight is None else self.class_weight.to(logits)

    def _loss(self, logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        class_weight = self._class_weight(logits)
        return F.cross_entropy(logits, label, class_weight, ignore_index=ignore_index)


@MODELS.register_module()
class OHEMCrossEntropyLoss(WeightedCrossEntropyLoss):
    """Cross entropy of the pixels that are hardest to classify, as in the official code.

    Those whose true class has a probability below ``thresh`` count, and if they are too few, the
    ``min_kept`` least probable pixels of the batch on this device. The loss is their plain mean;
    class weights scale the pixels, not the mean's denominator. mmseg's OHEM sampler keeps
    ``min_kept`` for each image and averages over other counts.

    Args:
        thresh (float): Probability below which a pixel counts. Defaults to 0.9 (official
            scripts).
        min_kept (int): Pixels that count at least. Defaults to 100000 (official scripts).
        class_weight (Sequence[float], optional): Weight of each class. Defaults to None: 1.
        loss_weight (float): Weight of the loss. Defaults to 1.
        loss_name (str): Name in the log. Defaults to ``'loss_ohem'``.

    Raises:
        ValueError: If ``thresh`` is not in (0, 1] or ``min_kept`` < 1.
    """

    def __init__(
        self,
        thresh: float = 0.9,
        min_kept: int = 100000,
        class_weight: Sequence[float] | None = None,
        loss_weight: float = 1.0,
        loss_name: str = 'loss_ohem',
    ) -> None:
        super().__init__(class_weight, loss_weight, loss_name)
        if not 0 < thresh <= 1:
            raise ValueError(f'thresh={thresh}: choose a probability in (0, 1]')
        if min_kept < 1:
            raise ValueError(f'min_kept={min_kept}: choose a number of pixels of at least 1')
        self.thresh = thresh
        self.min_kept = min_kept

    def _loss(self, logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        class_weight = self._class_weight(logits)
        losses = F.cross_entropy(
            logits, label, class_weight, ignore_index=ignore_index, reduction='none'
        )
        with torch.no_grad():
            counts = self._hard_pixels(logits, label, ignore_index)
        return (losses * counts).sum() / counts.sum().clamp(min=1)

    def _hard_pixels(self, logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        """Booleans of shape (B, H, W): the pixels whose losses are averaged."""
        valid = label != ignore_index
        true_class = label.masked_fill(~valid, 0).unsqueeze(1)
        probability = logits.softmax(1).gather(1, true_class).squeeze(1)  # (B, H, W)
        # The official code always ranks the first pixel of the batch, even an ignored one.
        valid.view(-1)[0] = True
        ranked = probability[valid]
        bound = ranked.kthvalue(min(self.min_kept + 1, len(ranked))).values
        return valid & (probability < bound.clamp(min=self.thresh))

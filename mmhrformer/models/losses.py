"""The segmentation losses of the official HRFormer code, for mmseg's decode heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from ..registry import MODELS


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
            label (Tensor): Class indices of shape (B, H, W).
            weight (Tensor, optional): Must be None; the place where mmseg passes the result of
                a pixel sampler.
            ignore_index (int): Label of pixels that do not count. Defaults to 255.

        Returns:
            Tensor: The loss, a scalar; 0 if every pixel is ignored.

        Raises:
            ValueError: If a pixel sampler is used or the class weights are not as many as the
                classes.
        """
        name = type(self).__name__
        if weight is not None:
            raise ValueError(f"{name} takes no pixel weights: remove the decode head's sampler")
        if self.class_weight is not None and len(self.class_weight) != logits.shape[1]:
            raise ValueError(
                f'{name}: class_weight has {len(self.class_weight)} numbers, the head '
                f'{logits.shape[1]} classes'
            )
        if (label == ignore_index).all():
            if not self._told_all_ignored:
                self._told_all_ignored = True
                print_log(
                    f'{name}: every pixel of a batch is ignored (label {ignore_index}), its loss '
                    'is 0. Check the labels if this happens often; it is said only once.',
                    'current',
                )
            return logits.sum() * 0
        return self.loss_weight * self._loss(logits, label, ignore_index)

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

"""The segmentation losses of the official HRFormer code, for mmseg's decode heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine import fileio
from mmengine.logging import print_log
from torch import Tensor, nn

from ..registry import MODELS
from .checks import check_flags

REDUCTIONS = ('none', 'mean', 'sum')
EPS = torch.finfo(torch.float32).eps  # against division by 0, as in mmseg


def is_weight(value: Any) -> bool:
    """Whether a value is a finite, non-negative number."""
    return isinstance(value, Real) and 0 <= value < math.inf


def check_reduction(name: str, value: str, avg_factor: Any = None) -> None:
    """Refuse an unknown reduction, and ``avg_factor`` with a sum."""
    if value not in REDUCTIONS:
        raise ValueError(f'{name}={value!r}: choose one of {REDUCTIONS}')
    if avg_factor is not None and value == 'sum':
        raise ValueError(f"avg_factor={avg_factor!r}: remove it for the reduction 'sum'")


def at_least_float32(scores: Tensor) -> Tensor:
    """Convert half precision: in float16 the number of pixels is infinite, and the mean loss 0."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def read_class_weight(value: Any) -> list[float] | None:
    """Convert class weights to a list; None stays None.

    Args:
        value (Sequence[float] | np.ndarray | Tensor | str | Path, optional): The weights, or a
            file with them as in mmseg: ``.npy``, ``.json``, ``.yml`` or ``.pkl``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the weights are not non-negative numbers, one per class.
    """
    weights = value
    if isinstance(value, str | Path):
        suffix = Path(value).suffix
        if suffix == '.npy':
            weights = np.load(BytesIO(fileio.get(value)))
        elif suffix in ('.json', '.yml', '.yaml', '.pkl', '.pickle'):
            weights = fileio.load(value)
    weights = weights.tolist() if hasattr(weights, 'tolist') else weights
    if weights is None or (isinstance(weights, Sequence) and all(map(is_weight, weights))):
        return weights
    read = '' if weights is value else f', read as {weights!r}'
    raise ValueError(
        f'class_weight={value!r}{read}: expected a non-negative number per class, a file with '
        'them (.npy, .json, .yml), or None'
    )


@MODELS.register_module()
class WeightedCrossEntropyLoss(nn.Module):
    """Cross entropy, averaged over the labeled pixels with their class weights.

    mmseg's own loss does not support class weights together with ignored labels: it looks up the
    weight of class 255. The interface is that of mmseg's loss.

    Args:
        class_weight (Sequence[float] | np.ndarray | Tensor | str | Path, optional): Weight of each
            class, or a file with them: ``.npy``, ``.json``, ``.yml``. Defaults to None: 1.
        loss_weight (float): Weight of the loss. Defaults to 1.
        loss_name (str): Name in the log; only losses whose name begins with ``loss_`` are
            optimized. Defaults to ``'loss_ce'``.
        reduction (str): ``'mean'``, ``'sum'``, or ``'none'`` for the loss of each pixel.
            Defaults to ``'mean'``.
        avg_non_ignore (bool): Whether the mean excludes ignored pixels; otherwise they count as
            pixels of loss 0 and weight 1, mmseg's default. Defaults to True (official).

    Raises:
        ValueError: If an argument is invalid.

    Examples:
        >>> loss = WeightedCrossEntropyLoss(class_weight=[1., 2.])
        >>> label = torch.tensor([[[0, 1, 255, 1]]])
        >>> round(loss(torch.zeros(1, 2, 1, 4), label, ignore_index=255).item(), 4)
        0.6931
    """

    def __init__(
        self,
        class_weight: Sequence[float] | np.ndarray | Tensor | str | Path | None = None,
        loss_weight: float = 1.0,
        loss_name: str = 'loss_ce',
        reduction: str = 'mean',
        avg_non_ignore: bool = True,
    ) -> None:
        super().__init__()
        if not is_weight(loss_weight):
            raise ValueError(f'loss_weight={loss_weight!r}: expected a non-negative number')
        check_reduction('reduction', reduction)
        check_flags(avg_non_ignore=avg_non_ignore)
        self.loss_weight = loss_weight
        self.loss_name = loss_name
        self.reduction = reduction
        self.avg_non_ignore = avg_non_ignore
        weights = read_class_weight(class_weight)
        weights = None if weights is None else torch.tensor(weights, dtype=torch.float)
        self.register_buffer('class_weight', weights, persistent=False)
        self._logged_all_ignored = False

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int | None = 255,
    ) -> Tensor:
        """Compute the loss.

        Args:
            cls_score (Tensor): Class scores of shape (B, classes, H, W).
            label (Tensor): Class indices of shape (B, H, W), int64.
            weight (Tensor, optional): Weights of the pixels' losses, of shape (B, H, W), as from a
                pixel sampler. Defaults to None: 1.
            avg_factor (float, optional): Divisor of the mean. Defaults to None: the number of
                pixels that count, or the sum of their class weights.
            reduction_override (str, optional): ``reduction`` for this call.
            ignore_index (int, optional): Label of pixels to ignore; None ignores no pixel.
                Defaults to 255.

        Returns:
            Tensor: The loss, (B, H, W) or reduced to a scalar; 0 if every pixel is ignored.

        Raises:
            ValueError: If an argument is invalid, or scores, labels and class weights do not match.
        """
        ignored = -100 if ignore_index is None else ignore_index  # as in torch; no label is -100
        reduction = reduction_override or self.reduction
        check_reduction('reduction_override', reduction, avg_factor)
        self._check_shapes(cls_score, label, weight)
        cls_score = at_least_float32(cls_score)
        any_counts = self._check_labels(cls_score, label, ignored)
        losses, divisor = (self._losses if any_counts else self._zeros)(cls_score, label, ignored)
        losses = self.loss_weight * (losses if weight is None else losses * weight)
        if reduction == 'mean':
            divisor = divisor.clamp(min=EPS) if avg_factor is None else avg_factor + EPS
            return losses.sum() / divisor
        return losses if reduction == 'none' else losses.sum()

    def _check_shapes(self, cls_score: Tensor, label: Tensor, weight: Tensor | None) -> None:
        """Refuse scores, class weights, labels and weights that do not match."""
        name, classes = type(self).__name__, cls_score.shape[1]
        if classes == 1:
            raise ValueError(
                f'{name} got scores of one channel, for which the softmax is always 1: use '
                'num_classes=2 without out_channels, or for out_channels=1 '
                "dict(type='mmseg.CrossEntropyLoss', use_sigmoid=True)"
            )
        if self.class_weight is not None and len(self.class_weight) != classes:
            raise ValueError(
                f'{name}: class_weight has {len(self.class_weight)} numbers, but the head has '
                f'{classes} classes'
            )
        shape = (len(cls_score), *cls_score.shape[2:])
        if label.shape != shape or label.dtype != torch.long:
            raise ValueError(
                f'{name} got labels of shape {tuple(label.shape)} and {label.dtype} for scores of '
                f'shape {tuple(cls_score.shape)}: expected class indices of shape {shape}, '
                'torch.int64'
            )
        if weight is not None and weight.shape != shape:
            raise ValueError(
                f'{name} got weights of shape {tuple(weight.shape)}: expected one per label, '
                f'{shape}'
            )

    def _check_labels(self, cls_score: Tensor, label: Tensor, ignore_index: int) -> bool:
        """Refuse labels that are not a class; return whether any pixel counts."""
        classes = cls_score.shape[1]
        counts = label != ignore_index
        wrong = counts & ((label < 0) | (label >= classes))
        # A GPU would abort on a wrong index without naming it. Both answers are read at once, as
        # each synchronizes with the GPU.
        any_wrong, any_counts = torch.stack([wrong.any(), counts.any()]).tolist()
        if any_wrong:
            labels = label[wrong].unique()[:5].tolist()
            raise ValueError(
                f'{type(self).__name__} got the labels {labels}, which are neither a '
                f'class (0 to {classes - 1}, as num_classes={classes}) nor ignore_index='
                f"{ignore_index}: correct the label maps, the dataset's reduce_zero_label, or "
                "the head's num_classes"
            )
        return any_counts

    def _zeros(self, cls_score: Tensor, label: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Losses and divisor if no pixel counts; logs this once."""
        if not self._logged_all_ignored:
            self._logged_all_ignored = True
            print_log(
                f'{type(self).__name__}: every pixel of a batch is ignored (label {ignore_index}), '
                'its loss is 0. Check the labels if this happens often; it is logged only once.',
                'current',
            )
        return cls_score.sum(1) * 0, cls_score.new_ones(())

    def _losses(self, cls_score: Tensor, label: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Losses of the pixels, (B, H, W), and the divisor for their mean."""
        losses = self._cross_entropy(cls_score, label, ignore_index)
        weights = torch.ones_like(losses)
        if self.class_weight is not None:
            known = label.clamp(0, cls_score.shape[1] - 1)
            weights = torch.where(label == known, self.class_weight.to(losses)[known], weights)
        if self.avg_non_ignore:
            weights = weights * (label != ignore_index)
        return losses, weights.sum()

    def _cross_entropy(self, cls_score: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        class_weight = None if self.class_weight is None else self.class_weight.to(cls_score)
        return F.cross_entropy(
            cls_score, label, class_weight, ignore_index=ignore_index, reduction='none'
        )


@MODELS.register_module()
class OHEMCrossEntropyLoss(WeightedCrossEntropyLoss):
    """Cross entropy of the hardest pixels (OHEM), as in the official code.

    Pixels whose true class has a probability below ``thresh`` count; if these are too few, the
    ``min_kept`` least probable pixels of the batch on this device. The loss is their plain mean;
    class weights scale the losses, not the divisor. mmseg's OHEM sampler, in contrast, keeps
    ``min_kept`` pixels per image and uses a different divisor.

    Args:
        thresh (float): Probability below which a pixel counts. Defaults to 0.9 (official
            scripts).
        min_kept (int): Minimum number of pixels that count. Defaults to 100000 (official scripts).
        class_weight (Sequence[float], optional): As in :class:`WeightedCrossEntropyLoss`.
        loss_weight (float): Weight of the loss. Defaults to 1.
        loss_name (str): Name in the log. Defaults to ``'loss_ohem'``.
        reduction (str): ``'mean'`` or ``'sum'`` over the pixels that count, or ``'none'``, with
            loss 0 for the others. Defaults to ``'mean'``.

    Raises:
        ValueError: If ``thresh`` is not in (0, 1] or ``min_kept`` < 1.
    """

    def __init__(
        self,
        thresh: float = 0.9,
        min_kept: int = 100000,
        class_weight: Sequence[float] | np.ndarray | Tensor | str | Path | None = None,
        loss_weight: float = 1.0,
        loss_name: str = 'loss_ohem',
        reduction: str = 'mean',
    ) -> None:
        super().__init__(class_weight, loss_weight, loss_name, reduction)
        if not 0 < thresh <= 1:
            raise ValueError(f'thresh={thresh}: expected a probability in (0, 1]')
        if min_kept < 1:
            raise ValueError(f'min_kept={min_kept}: expected a positive number of pixels')
        self.thresh = thresh
        self.min_kept = min_kept

    def _losses(self, cls_score: Tensor, label: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        losses = self._cross_entropy(cls_score, label, ignore_index)
        with torch.no_grad():
            counts = self._hard_pixels(cls_score, label, ignore_index)
        return losses * counts, counts.sum()

    def _hard_pixels(self, cls_score: Tensor, label: Tensor, ignore_index: int) -> Tensor:
        """Mask of the pixels whose losses are averaged, of shape (B, H, W)."""
        valid = label != ignore_index
        true_class = label.masked_fill(~valid, 0).unsqueeze(1)
        probability = cls_score.softmax(1).gather(1, true_class).squeeze(1)  # (B, H, W)
        # The official code always ranks the first pixel of the batch, even if it is ignored.
        valid[(0,) * valid.dim()] = True
        ranked = probability[valid]
        bound = ranked.kthvalue(min(self.min_kept + 1, len(ranked))).values
        return valid & (probability < bound.clamp(min=self.thresh))

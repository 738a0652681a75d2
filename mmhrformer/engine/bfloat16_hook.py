"""A hook for training mmpose's heatmap heads in bfloat16."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn

from ..registry import HOOKS


def _computes_in_bfloat16(wrapper: OptimWrapper, module: nn.Module) -> bool:
    """Whether training runs a module in bfloat16, by autocast or by its weights."""
    wrappers = wrapper.values() if hasattr(wrapper, 'values') else [wrapper]
    dtypes = [getattr(one, 'cast_dtype', None) for one in wrappers]
    dtypes = [getattr(torch, dtype) if isinstance(dtype, str) else dtype for dtype in dtypes]
    return torch.bfloat16 in (*dtypes, *(p.dtype for p in module.parameters()))


@HOOKS.register_module()
class BFloat16PoseHook(Hook):
    """Allow pose estimators with mmpose's ``HeatmapHead`` to train in bfloat16.

    After the loss, such a head computes the accuracy ``acc_pose`` in NumPy, which has no bfloat16.
    In that data type the hook disables it and logs a warning; in others it does nothing.

    Examples:
        >>> custom_hooks = [dict(type='mmhrformer.BFloat16PoseHook')]
    """

    def before_train(self, runner: Runner) -> None:
        """Disable the accuracy.

        Args:
            runner (Runner): The runner.
        """
        from mmpose.models import HeatmapHead  # not at the top, since mmpose is optional

        model = runner.model
        while is_model_wrapper(model):
            model = model.module
        head, options = getattr(model, 'head', None), getattr(model, 'train_cfg', None) or {}
        if (
            isinstance(head, HeatmapHead)
            and options.get('compute_acc', True)
            and _computes_in_bfloat16(runner.optim_wrapper, head)
        ):
            model.train_cfg = {**options, 'compute_acc': False}
            runner.logger.warning(
                'acc_pose is not logged: mmpose computes it in NumPy, which has no bfloat16 '
                '(model.train_cfg.compute_acc=False). The loss and the validation metrics are not '
                'affected.'
            )

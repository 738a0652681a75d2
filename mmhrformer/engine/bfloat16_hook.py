"""Training of mmpose's heatmap heads in bfloat16."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn


def _computes_in_bfloat16(wrapper: OptimWrapper, module: nn.Module) -> bool:
    """Whether a training step computes a module in bfloat16, by autocast or by its weights."""
    wrappers = wrapper.values() if hasattr(wrapper, 'values') else [wrapper]
    dtypes = [getattr(one, 'cast_dtype', None) for one in wrappers]
    dtypes = [getattr(torch, dtype) if isinstance(dtype, str) else dtype for dtype in dtypes]
    return torch.bfloat16 in (*dtypes, *(p.dtype for p in module.parameters()))


@HOOKS.register_module()
class BFloat16PoseHook(Hook):
    """Lets pose estimators with mmpose's ``HeatmapHead`` train in bfloat16.

    After the loss such a head counts the accuracy ``acc_pose`` in NumPy, which has no bfloat16. In
    that data type the hook turns it off and says so; in others it does nothing.

    Examples:
        >>> custom_hooks = [dict(type='mmhrformer.BFloat16PoseHook')]
    """

    def before_train(self, runner: Runner) -> None:
        """Turn the accuracy off.

        Args:
            runner (Runner): The runner.
        """
        from mmpose.models import HeatmapHead  # the rest of the package does without mmpose

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
                'acc_pose is not logged: mmpose counts it in NumPy, which has no bfloat16 '
                '(model.train_cfg.compute_acc=False). The loss and the metrics of validation are '
                'not affected.'
            )

"""The weight decay rules of the three official codes, in two parameter groups."""

from __future__ import annotations

import inspect

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS

# What can be spared from weight decay: rule -> whether it holds for a parameter.
NO_DECAY = {
    'vectors': lambda name, parameter: parameter.ndim <= 1,  # biases, norms
    'bias_tables': lambda name, parameter: name.endswith('relative_position_bias_table'),
}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DecayGroupsConstructor(DefaultOptimWrapperConstructor):
    """Builds an optimizer with a decayed and a spared group of parameters.

    mmengine's own constructor makes a group of every parameter (1,200 in HRFormer-S), which
    optimizers then update one by one. On CUDA the optimizer is fused, unless its config says
    otherwise by ``fused`` or ``foreach``. ``torch.compile`` of a training step leaves it out.

    Args:
        optim_wrapper_cfg (dict): Config of the optimizer wrapper and, under ``'optimizer'``, of
            the optimizer.
        paramwise_cfg (dict, optional): ``no_decay``, a list of what is not decayed: ``'vectors'``
            (biases and norms), ``'bias_tables'`` (relative position biases). The official code of
            classification spares the vectors, that of pose the tables, that of segmentation both.

    Raises:
        ValueError: If ``paramwise_cfg`` says anything else.
    """

    def _validate_cfg(self) -> None:
        unknown = set(self.paramwise_cfg) - {'no_decay'}
        if unknown:
            raise ValueError(
                f'paramwise_cfg: {type(self).__name__} has no option {", ".join(sorted(unknown))}, '
                'only no_decay. For rates of single parts leave optim_wrapper.constructor to '
                "mmengine's DefaultOptimWrapperConstructor"
            )
        self.no_decay = list(self.paramwise_cfg.get('no_decay', ()))
        for rule in self.no_decay:
            if rule not in NO_DECAY:
                raise ValueError(
                    f'paramwise_cfg.no_decay={self.no_decay}: choose from {list(NO_DECAY)}'
                )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper for the parameters of a model that are to be trained."""
        model = getattr(model, 'module', model)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        decayed, spared = [], []
        for name, parameter in named:
            rules = (NO_DECAY[rule] for rule in self.no_decay)
            (spared if any(rule(name, parameter) for rule in rules) else decayed).append(parameter)
        groups = [dict(params=decayed), dict(params=spared, weight_decay=0.0)]
        options = dict(self.optimizer_cfg, params=[group for group in groups if group['params']])
        on_cuda = all(parameter.is_cuda for _, parameter in named)
        if on_cuda and self._can_be_fused():
            options['fused'] = True
        wrapper = {'type': 'OptimWrapper', **self.optim_wrapper_cfg}
        optimizer = OPTIMIZERS.build(options)
        built = OPTIM_WRAPPERS.build(wrapper, default_args=dict(optimizer=optimizer))
        # `compile=True` compiles the whole training step. Where the optimizer is not fused it is
        # code for each of a thousand tensors, with which the compiler does not come to an end.
        built.update_params = torch.compiler.disable(built.update_params)
        return built

    def _can_be_fused(self) -> bool:
        if {'fused', 'foreach'} & set(self.optimizer_cfg):
            return False
        kind = self.optimizer_cfg['type']
        kind = OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
        return kind is not None and 'fused' in inspect.signature(kind).parameters

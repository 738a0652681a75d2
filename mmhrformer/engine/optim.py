"""Weight decay as in the three official codes, and layer-wise decay, with few parameter groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Real

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from ..checkpoints.contents import plain_name
from ..registry import OPTIM_WRAPPER_CONSTRUCTORS

# Rules for parameters without weight decay -> whether one applies to a parameter.
NO_DECAY = {
    'vectors': lambda name, parameter: parameter.ndim <= 1,  # biases, norms
    # Parametrized ones are called ...relative_position_bias_table.original.
    'bias_tables': lambda name, parameter: 'relative_position_bias_table' in name.split('.'),
}


def _depth_getter(model: nn.Module) -> Callable[[str], tuple[int, int]]:
    """A function that returns the depth of a parameter's layer and the number of layers."""
    backbone = getattr(model, 'backbone', None)
    if hasattr(backbone, 'get_layer_depth'):
        return lambda name: backbone.get_layer_depth(name, 'backbone.')
    if backbone is None and hasattr(model, 'get_layer_depth'):
        return lambda name: model.get_layer_depth(name, '')
    raise ValueError(
        f'paramwise_cfg.layer_decay_rate: {type(backbone or model).__name__} has no '
        'get_layer_depth: remove the option, or use a backbone that has one, such as '
        'mmhrformer.HRFormer'
    )


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DecayGroupsConstructor(DefaultOptimWrapperConstructor):
    """Build an optimizer with one parameter group with weight decay and one without, per layer.

    mmengine's own constructor creates a group for each parameter (1,200 in HRFormer-S), which
    optimizers then update one by one. On CUDA the optimizer is fused, unless its config sets
    ``fused`` or ``foreach``. It is excluded from ``torch.compile`` of a training step.

    Args:
        optim_wrapper_cfg (dict): Config of the optimizer wrapper and, under ``'optimizer'``, of
            the optimizer.
        paramwise_cfg (dict, optional): ``no_decay``, a list of parameters without weight decay:
            ``'vectors'`` (biases and norms), ``'bias_tables'`` (relative position biases). The
            official classification code excludes the vectors, the pose code the tables, the
            segmentation code both. ``layer_decay_rate``, between 0 and 1: the ratio of the learning
            rates of a backbone layer and the next; necks and heads have the full rate. It works in
            the models of all three frameworks, by ``backbone.get_layer_depth``. Without it, there
            are only two groups.

    Raises:
        TypeError: If ``paramwise_cfg`` is not a dict.
        ValueError: If it has other options or values, the backbone has no ``get_layer_depth``, or
            no parameter is trainable.
    """

    def _validate_cfg(self) -> None:
        if not isinstance(self.paramwise_cfg, Mapping):
            raise TypeError(
                f'paramwise_cfg={self.paramwise_cfg!r}: expected a dict, such as '
                "dict(no_decay=['vectors'])"
            )
        unknown = set(self.paramwise_cfg) - {'no_decay', 'layer_decay_rate'}
        if unknown:
            raise ValueError(
                f'paramwise_cfg: {type(self).__name__} has no option {", ".join(sorted(unknown))}, '
                'only no_decay and layer_decay_rate. For the rates of individual modules, use '
                "mmengine's DefaultOptimWrapperConstructor as optim_wrapper.constructor"
            )
        rules = self.paramwise_cfg.get('no_decay', ())
        self.no_decay = [rules] if isinstance(rules, str) else list(rules)
        for rule in self.no_decay:
            if rule not in NO_DECAY:
                raise ValueError(
                    f'paramwise_cfg.no_decay={self.no_decay}: choose from {list(NO_DECAY)}'
                )
        self.rate = self.paramwise_cfg.get('layer_decay_rate', 1.0)
        if not (isinstance(self.rate, Real) and 0 < self.rate <= 1):
            raise ValueError(
                f'paramwise_cfg.layer_decay_rate={self.rate!r}: expected a number in (0, 1]'
            )
        if self.rate != 1 and self.base_lr is None:
            raise ValueError('paramwise_cfg.layer_decay_rate needs optimizer.lr: set it')

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper for the trainable parameters of a model."""
        model = getattr(model, 'module', model)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError(
                f'{type(model).__name__} has no trainable parameter: check frozen_stages and '
                'other options that set requires_grad=False'
            )
        kind = self.optimizer_cfg['type']
        with OPTIMIZERS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind) if isinstance(kind, str) else kind
        arguments = list(inspect.signature(kind).parameters) if kind else ['params']
        options = {**self.optimizer_cfg, arguments[0]: self._param_groups(model, named)}
        on_cuda = all(parameter.is_cuda for parameter in named.values())
        if on_cuda and 'fused' in arguments and not {'fused', 'foreach'} & set(options):
            options['fused'] = True
        optimizer = OPTIMIZERS.build(options)
        wrapper = {'type': 'OptimWrapper', **self.optim_wrapper_cfg}
        built = OPTIM_WRAPPERS.build(wrapper, default_args=dict(optimizer=optimizer))
        # `compile=True` compiles the whole training step. An unfused optimizer unrolls over a
        # thousand tensors there, on which the compiler does not finish.
        built.update_params = torch.compiler.disable(built.update_params)
        return built

    def _param_groups(self, model: nn.Module, named: Mapping[str, nn.Parameter]) -> list[dict]:
        """Groups with and without weight decay per layer, from the last layer to the first."""
        get_depth = _depth_getter(model) if self.rate != 1 else None
        members = {}  # by number of layers above, and by whether weight decay is off
        for name, parameter in named.items():
            exempt = any(NO_DECAY[rule](name, parameter) for rule in self.no_decay)
            depth, layers = get_depth(plain_name(name)) if get_depth else (0, 1)
            members.setdefault((layers - 1 - depth, exempt), []).append(parameter)
        groups = []
        for (above, exempt), parameters in sorted(members.items(), key=lambda item: item[0]):
            group = dict(params=parameters)
            if exempt:
                group['weight_decay'] = 0.0
            if above:
                group['lr'] = self.base_lr * self.rate**above
            groups.append(group)
        return groups

"""Unused options of a config, and variables that are changed too late.

A config is Python: a variable such as ``codec`` is copied into options when its file is read. If an
inheriting config or ``--cfg-options`` sets the variable again, that has no effect.
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

# Options that the stock tools and libraries read, besides the arguments of mmengine's Runner.
READ_ELSEWHERE = {
    'activation_checkpointing', 'compile', 'custom_imports', 'efficient_conv_bn_eval',
    'model_wrapper_cfg', 'preprocess_cfg', 'runner_type', 'strategy', 'tta_model', 'tta_pipeline',
}  # fmt: skip

# Options of the old 0.x frameworks, which are no longer used, and their replacements.
REPLACED = {
    'fp16': "optim_wrapper.type='AmpOptimWrapper'",
    'optimizer': 'optim_wrapper.optimizer',
    'optimizer_config': 'optim_wrapper.clip_grad',
    'lr_config': 'param_scheduler',
    'momentum_config': 'param_scheduler',
    'runner': 'train_cfg',
    'total_epochs': 'train_cfg.max_epochs',
    'data': 'train_dataloader, val_dataloader and test_dataloader',
    'evaluation': 'val_evaluator and train_cfg.val_interval',
    'checkpoint_config': 'default_hooks.checkpoint',
    'log_config': 'default_hooks.logger',
    'dist_params': 'env_cfg.dist_cfg',
    'workflow': 'train_cfg',
    'samples_per_gpu': 'train_dataloader.batch_size',
    'find_unused_parameters': 'model_wrapper_cfg.find_unused_parameters',
}


def dead_options(cfg: Config) -> dict[str, str]:
    """Find top-level options that are not used.

    Args:
        cfg (Config): The config.

    Returns:
        dict[str, str]: Option -> what to do instead, or an empty string. Variables whose value is
        also elsewhere in the config, or was before it was changed there, count as used; numbers
        only if a file computes options from them, or if an option with a similar name is equal.
    """
    values, late, files = _values(cfg), late_variables(cfg), _files(cfg)
    places = _places(values)
    uses = {name: _uses(name) for name in files}
    dead = {
        key: ''
        for key in _variables(values)
        if not any(_may_be_copy(key, values[key], path, value) for path, value in places.items())
        and not any(
            file.get(key) == values[key] and key in uses[name] for name, file in files.items()
        )
    }
    for key in list(dead):
        if key in late:
            dead[key] = (
                'it was copied when the file was read. Set the options it was copied to: '
                + ', '.join(late[key])
            )
        elif _was_copied(key, values[key], files.get(cfg.filename, {})) or any(
            file.get(key) == values[key] for name, file in files.items() if name != cfg.filename
        ):
            del dead[key]
    # A variable that is used may also have such a name, as in mmsegmentation's schedules.
    return dead | {key: f'use {REPLACED[key]}' for key in dead.keys() & REPLACED.keys()}


def late_variables(cfg: Config) -> dict[str, list[str]]:
    """Find variables that were changed after they had been copied.

    Args:
        cfg (Config): The config.

    Returns:
        dict[str, list[str]]: Variable -> the options that still have its old value. Others may
        have the new one.
    """
    values = _values(cfg)
    places = _places(values)
    late = {key: {} for key in _variables(values)}  # dicts as ordered sets
    for name, file in _files(cfg).items() if late else ():
        before, uses = _places(file), _uses(name)
        for key in late.keys() & file.keys():
            if file[key] != values[key]:
                late[key].update(
                    (path, None)
                    for path in _copies(key, file[key], values[key], before, uses.get(key, ()))
                    if path in places and places[path] == before[path] != values[key]
                )
    return {key: list(paths) for key, paths in late.items() if paths}


def merge_options(cfg: Config, options: Mapping[str, Any] | None) -> None:
    """Override options of a config, and refuse names whose values would not be used.

    Args:
        cfg (Config): The config; changed in place.
        options (Mapping, optional): Values by dotted name.

    Raises:
        ValueError: If a name is not that of an option, or of a variable that was copied.
    """
    before = set(cfg)
    cfg.merge_from_dict(dict(options or {}))
    keys = {name: name.partition('.')[0] for name in options or ()}
    variables = set(_variables(_values(cfg))) & set(keys.values())
    late = late_variables(cfg) if variables else {}
    for name, key in keys.items():
        if key in variables - before:
            raise ValueError(
                f'cfg_options: {name} has no effect: the config has no option {key}. Check the '
                'name, such as model.backbone.arch'
            )
        if key in late:
            raise ValueError(
                f'cfg_options: {name} has no effect: {key} was copied when the file was read. Set '
                f'the options it was copied to: {", ".join(late[key])}'
            )


def used_counterparts(cfg: Config, key: str) -> list[str]:
    """Options with the same name or keys as a variable, which may be meant instead."""
    values = _values(cfg)
    value = values[key]
    name = 'pipeline' if key.endswith('_pipeline') else key
    return [
        path
        for path, other in _places(values).items()
        if path.split('.')[-1] == name
        or (isinstance(value, dict) and isinstance(other, dict) and set(value) == set(other))
    ]


def _values(cfg: Config) -> dict[str, Any]:
    return _without_scopes(cfg.to_dict())


def _without_scopes(value: Any) -> Any:
    """Remove the scopes that mmengine adds to base configs of another framework."""
    if isinstance(value, dict):
        return {key: _without_scopes(v) for key, v in value.items() if key != '_scope_'}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_without_scopes, value))
    return value


def _variables(cfg: Mapping) -> list[str]:
    """Top-level names that are not options by themselves."""
    read = set(inspect.signature(Runner.__init__).parameters) | READ_ELSEWHERE
    model = cfg.get('model')
    if isinstance(model, dict) and model.get('data_preprocessor'):
        read -= {'data_preprocessor'}  # the model's takes precedence
    return [key for key in cfg if key not in read]


def _places(cfg: Mapping) -> dict[str, Any]:
    """All options, also nested ones, by dotted name."""
    variables = _variables(cfg)
    return dict(
        place for key, value in cfg.items() if key not in variables for place in _inside(key, value)
    )


def _inside(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield path, value
    if isinstance(value, dict):
        items = value.items()
    else:
        items = enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in items:
        yield from _inside(f'{path}.{key}', inner)


def _files(cfg: Config) -> dict[str, dict[str, Any]]:
    """The files of which a config consists, each with everything that it inherits."""
    lines = (cfg.text or '').splitlines()  # contains the name of each file above its content
    names = [cfg.filename, *(line for line in lines if os.path.isabs(line))]
    return {
        name: _values(Config.fromfile(name, import_custom_modules=False))
        for name in dict.fromkeys(filter(None, names))
        if os.path.isfile(name)
    }


def _uses(file: str) -> dict[str, list[str]]:
    """The names that a file reads -> the options that it computes from each, by dotted name."""
    direct = {}
    try:
        statements = ast.parse(Path(file).read_text('utf-8')).body
    except SyntaxError:  # YAML, which has no variables, or a template of mmengine outside quotes
        return {}
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else ()
        target = next((target.id for target in targets if isinstance(target, ast.Name)), '')
        for path, node in _leaves(target, statement):
            for name in _names_read(node) - {target}:
                direct.setdefault(name, []).append(path)
    return {name: list(_reached(name, direct, {name})) for name in direct}


def _reached(name: str, direct: Mapping[str, list[str]], seen: set[str]) -> Iterator[str]:
    """The options computed from a variable, also through other variables."""
    for path in direct.get(name, ()):
        yield path
        via, dot, rest = path.partition('.')
        if via not in seen:
            for further in _reached(via, direct, seen | {via}):
                yield further + dot + rest


def _leaves(path: str, node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The expressions in nested dicts and lists, with the dotted name of each."""
    if isinstance(node, ast.Assign):
        node = node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        items = [(keyword.arg, keyword.value) for keyword in node.keywords]
    elif isinstance(node, ast.Dict):
        items = [(getattr(key, 'value', None), value) for key, value in zip(node.keys, node.values)]
    else:
        items = list(enumerate(node.elts)) if isinstance(node, (ast.List, ast.Tuple)) else []
    for key, value in items:
        yield from _leaves(path if key is None else f'{path}.{key}', value)
    if not items:
        yield path, node


def _names_read(node: ast.AST) -> set[str]:
    """Variables in an expression, also those of a base file."""
    reads = [n for n in ast.walk(node) if isinstance(getattr(n, 'ctx', None), ast.Load)]
    names = {n.id for n in reads if isinstance(n, ast.Name)}
    return names | {n.attr for n in reads if isinstance(n, ast.Attribute)}


def _may_be_copy(key: str, value: Any, path: str, other: Any) -> bool:
    """Whether an option may be a copy of a variable; equal numbers are often unrelated."""
    is_plain = not isinstance(value, (str, list, tuple, dict))
    return (not is_plain or key.endswith(path.split('.')[-1])) and _is_copy(value, other)


def _is_copy(value: Any, other: Any) -> bool:
    if isinstance(value, str) and isinstance(other, str):
        return other == value or (value != '' and other.startswith(value.rstrip('/') + '/'))
    if isinstance(value, (list, tuple)) and _are_dicts(other):
        # One step per item, as mmsegmentation's configs create from `img_ratios`.
        steps = ([step.get(key) for step in other] for key in other[0])
        return value == other or list(value) in steps
    return type(value) is type(other) and value == other


def _are_dicts(steps: Any) -> bool:
    return isinstance(steps, list) and steps != [] and all(isinstance(s, dict) for s in steps)


def _copies(
    key: str, value: Any, now: Any, places: Mapping[str, Any], computed: Iterable[str] = ()
) -> list[str]:
    """Options to which a variable, or a changed part of it, was copied, or computed from it."""
    parts = {key: value}
    if isinstance(value, dict) and isinstance(now, dict):
        parts.update((name, part) for name, part in value.items() if part != now.get(name))
    found = []
    for path, other in places.items():
        if any(path.startswith(f'{above}.') for above in found):
            continue
        for name, part in parts.items():
            similar = name == key or name.endswith(path.split('.')[-1])
            if similar and _may_be_copy(name, part, path, other):
                found.append(path)
                break
    return found + [path for path in computed if path in places and path not in found]


def _was_copied(key: str, value: Any, file: Mapping) -> bool:
    """Whether a variable was used in its file, but the options were changed afterwards."""
    return file.get(key) == value and bool(_copies(key, value, value, _places(file)))

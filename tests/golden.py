"""Models built from the shipped configs, with the weights of the golden files."""

from __future__ import annotations

import copy
import importlib.util
import json
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmhrformer.checkpoints import convert

ROOT = Path(__file__).parents[1]
DATA = ROOT / 'tests/data/golden'
CONFIGS = ROOT / 'configs'

_spec = importlib.util.spec_from_file_location('recipe', DATA / 'recipe.py')
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)

CLS_CONFIGS = {
    arch: f'hrformer_cls/hrformer-{arch}_8xb128_in1k.py' for arch in ('tiny', 'small', 'base')
}
POSE_CONFIGS = {
    arch: f'hrformer_pose/td-hm_hrformer-{arch}_8xb32-210e_coco-256x192.py'
    for arch in ('tiny', 'small', 'base')
}
SEG_CONFIGS = {
    arch: f'hrformer_seg/ocrnet_hrformer-{arch}_8xb1-80k_cityscapes-512x1024.py'
    for arch in ('small', 'base', 'base-w15')
}


@cache
def _parse(path: Path) -> Config:
    return Config.fromfile(path)


def read_config(config: str | Path) -> Config:
    """A copy of a shipped config, which is parsed only once."""
    return copy.deepcopy(_parse(CONFIGS / config))


def build(config: str | Path, device='cpu', **options):
    """Build the model of a shipped config; options as on the command line."""
    cfg = read_config(config)
    cfg.merge_from_dict(options)
    # On the meta device nothing is drawn, and no memory taken.
    made_on = torch.device('meta' if device == 'meta' else 'cpu')
    with DefaultScope.overwrite_default_scope(cfg.default_scope), made_on:
        return MODELS.build(cfg.model).to(device)


def load(name: str) -> dict[str, np.ndarray]:
    """Read a golden file."""
    with np.load(DATA / name, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def read_json(name: str):
    return json.loads((DATA / name).read_text())


@lru_cache(maxsize=4)
def _make_state_dict(keys: str) -> dict[str, torch.Tensor]:
    return recipe.make_torch_state_dict(recipe.load_keys(DATA / keys), 0)


def official_state_dict(keys: str) -> dict[str, torch.Tensor]:
    """A copy of the deterministic weights of an official model, by their official names."""
    return {name: tensor.clone() for name, tensor in _make_state_dict(keys).items()}


def official_checkpoint(task: str, keys: str) -> dict:
    """The same, wrapped as the official code saves it."""
    state_dict = official_state_dict(keys)
    if task == 'cls':
        return {'model': state_dict, 'optimizer': {}, 'epoch': 299, 'max_accuracy': 0.0}
    if task == 'pose':
        return {'meta': {}, 'state_dict': state_dict, 'optimizer': {}}
    return {'config_dict': {}, 'state_dict': {f'module.{k}': v for k, v in state_dict.items()}}


def image(shape, seed: int = 0, dtype=torch.float32, device='cpu') -> torch.Tensor:
    return torch.from_numpy(recipe.make_input(shape, seed)).to(device, dtype)


def difference(golden, name: str, tensor: torch.Tensor) -> float:
    """Largest absolute difference to a golden tensor, whatever its layout.

    Inside a block our maps are (B, H, W, C); the golden ones are tokens (B, H * W, C) or maps
    (B, C, H, W).
    """
    array = tensor.detach().cpu().numpy()
    shape = tuple(golden[f'{name}.shape'])
    if array.ndim == 4 and len(shape) == 3:
        array = array.reshape(shape)
    elif array.ndim == 4 and array.shape != shape:
        array = array.transpose(0, 3, 1, 2)
    return recipe.compare(golden, name, array)['max_abs']


def capture(backbone, prefix: str = '') -> dict[str, torch.Tensor]:
    """Record, at the next forward pass, the intermediate tensors that the golden files hold."""
    seen: dict[str, torch.Tensor] = {}

    def keep(module, name):
        def hook(module, args, out):
            seen.setdefault(prefix + name, out.detach())

        module.register_forward_hook(hook)

    def keep_streams(module, name):
        def hook(module, args, outs):
            for i, out in enumerate(outs):
                if out is not None:
                    seen.setdefault(f'{prefix}{name}.out{i}', out.detach())

        module.register_forward_hook(hook)

    def keep_stem(module, args):
        seen.setdefault(f'{prefix}stem', args[0].detach())

    block = backbone.stage2[0].branches[0][0]
    backbone.layer1.register_forward_pre_hook(keep_stem)
    keep(backbone.layer1, 'layer1')
    keep(block.attn, 'stage2.0.branches.0.0.attn')
    keep(block.ffn, 'stage2.0.branches.0.0.mlp')
    keep(block, 'stage2.0.branches.0.0')
    for stage in (2, 3, 4):
        for m, module in enumerate(getattr(backbone, f'stage{stage}')):
            keep_streams(module, f'stage{stage}.{m}')
    return seen


def by_official_name(
    tensors: dict[str, torch.Tensor], official: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Give tensors of our model (gradients, say) the official names and shapes.

    Every official tensor is filled with a number of its own and converted; where that number
    arrives is where the official tensor's values are.
    """
    labels = {
        name: torch.full_like(value, i, dtype=torch.float64)
        for i, (name, value) in enumerate(official.items())
    }
    converted, _ = convert(labels)
    named = {}
    for ours, label in converted.items():
        if tensors.get(ours) is None:
            continue
        for i in label.unique().int().tolist():
            name = list(official)[i]
            named[name] = tensors[ours][label == i].reshape(official[name].shape)
    return named

"""Build the models that ``tools/benchmark.py`` compares.

A candidate is a model, perhaps with suffixes that say how it is run: ``ours``,
``ours-fused-compiled``, ``mmpose-nchw``, ``hrnet-w32-compiled``.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mmhrformer.apis import fuse_for_inference
from mmhrformer.checkpoints import to_dialect
from mmhrformer.configs import PACKAGES, find_config
from mmhrformer.models.hrformer import parse_arch
from mmhrformer.utils.install_hints import how_to_install

# Our configs, and the framework that builds them.
CONFIGS = {
    'pose': 'td-hm_hrformer-{}_8xb32-210e_coco-256x192',
    'cls': 'hrformer-{}_8xb128_in1k',
    'seg': 'ocrnet_hrformer-{}_8xb1-80k_cityscapes-512x1024',
}
SCOPES = {'pose': 'mmpose', 'cls': 'mmpretrain', 'seg': 'mmseg'}

# Configs of the frameworks' own models.
POSE = 'body_2d_keypoint/topdown_heatmap/coco/td-hm_'
HRFORMER = f'{POSE}hrformer-{{}}_8xb32-210e_coco-256x192.py'
STOCK = {
    ('pose', 'hrnet-w32'): f'{POSE}hrnet-w32_8xb64-210e_coco-256x192.py',
    ('pose', 'hrnet-w48'): f'{POSE}hrnet-w48_8xb32-210e_coco-256x192.py',
    ('pose', 'vit-s'): f'{POSE}ViTPose-small_8xb64-210e_coco-256x192.py',
    ('pose', 'vit-b'): f'{POSE}ViTPose-base_8xb64-210e_coco-256x192.py',
    ('cls', 'hrnet-w32'): 'hrnet/hrnet-w32_4xb32_in1k.py',
    ('cls', 'hrnet-w48'): 'hrnet/hrnet-w48_4xb32_in1k.py',
    ('cls', 'vit-s'): 'deit/deit-small_4xb256_in1k.py',
    ('cls', 'vit-b'): 'deit/deit-base_16xb64_in1k.py',
    ('seg', 'hrnet-w48'): 'ocrnet/ocrnet_hr48_4xb2-80k_cityscapes-512x1024.py',
}

SAME_WEIGHTS = ('ours', 'mmpose')
BASES = (*SAME_WEIGHTS, 'hrnet-w32', 'hrnet-w48', 'vit-s', 'vit-b')
SUFFIXES = {
    'fused': 'ours only: mmhrformer.apis.fuse_for_inference',
    'with-cp': 'ours only, training: recompute blocks in the backward pass',
    'compiled': 'torch.compile, see --compile-mode',
    'cudagraph': 'CUDA inference: one captured CUDA graph',
    'nchw': 'contiguous images and weights, whatever --channels-last says',
    'nhwc': 'channels-last images and weights, whatever --channels-last says',
}


class BenchmarkError(ValueError):
    """Something that was asked for cannot be measured; says what to ask for instead."""


@dataclass(frozen=True)
class Spec:
    """A candidate, by its name.

    Attributes:
        name (str): The name, as asked for.
        base (str): One of :data:`BASES`.
        suffixes (frozenset[str]): Some of :data:`SUFFIXES`.
    """

    name: str
    base: str
    suffixes: frozenset[str]

    def has(self, suffix: str) -> bool:
        """Tell whether the name has a suffix."""
        return suffix in self.suffixes


def parse_spec(name: str) -> Spec:
    """Take the name of a candidate apart.

    Args:
        name (str): One of :data:`BASES`, perhaps followed by some of :data:`SUFFIXES`, each with
            a ``-`` before it.

    Returns:
        Spec: The candidate.

    Raises:
        BenchmarkError: If the name is unknown or contradicts itself.

    Examples:
        >>> parse_spec('ours-fused-compiled').base
        'ours'
    """
    base, suffixes = name, set()
    while base not in BASES:
        found = [suffix for suffix in SUFFIXES if base.endswith(f'-{suffix}')]
        if not found:
            raise BenchmarkError(
                f'there is no candidate {name!r}: choose one of {", ".join(BASES)}, followed by '
                f'any of {", ".join("-" + suffix for suffix in SUFFIXES)}'
            )
        suffixes.add(found[0])
        base = base.removesuffix(f'-{found[0]}')
    for suffix in ('fused', 'with-cp'):
        if suffix in suffixes and base != 'ours':
            raise BenchmarkError(f'candidate {name!r}: only ours can be {suffix}')
    for pair in (('nchw', 'nhwc'), ('fused', 'with-cp')):
        if suffixes.issuperset(pair):
            raise BenchmarkError(f'candidate {name!r}: choose {pair[0]} or {pair[1]}')
    return Spec(name, base, frozenset(suffixes))


def why_unavailable(spec: Spec, mode: str, device: str, autocast: bool) -> str:
    """Say why a candidate cannot be measured in this run.

    Args:
        spec (Spec): The candidate.
        mode (str): ``'infer'`` or ``'train'``.
        device (str): ``'cpu'`` or ``'cuda'``.
        autocast (bool): Whether the data type comes from autocast.

    Returns:
        str: The reason, or nothing if it can be measured.
    """
    if spec.has('fused') and mode == 'train':
        return 'fused models cannot be trained'
    if spec.has('with-cp') and mode == 'infer':
        return 'nothing is recomputed in inference'
    if spec.has('cudagraph') and mode == 'train':
        return 'CUDA graphs are captured of inference only'
    if spec.has('cudagraph') and device != 'cuda':
        return 'CUDA graphs need --device cuda'
    if spec.has('cudagraph') and autocast:
        return 'CUDA graphs are captured without autocast: --precision-by cast'
    return ''


def check_models(task: str, arch: str, specs: list[Spec]) -> None:
    """Check that the models exist and that their frameworks are installed.

    Args:
        task (str): ``'pose'``, ``'cls'`` or ``'seg'``.
        arch (str): The architecture of ours.
        specs (list[Spec]): The candidates.

    Raises:
        BenchmarkError: If one does not.
    """
    needed = {SCOPES[task]: f'task {task}'}
    for spec in specs:
        if spec.base == 'mmpose':
            needed['mmpose'] = f'candidate {spec.name}'
        elif spec.base not in SAME_WEIGHTS and (task, spec.base) not in STOCK:
            stock = [base for other, base in STOCK if other == task]
            raise BenchmarkError(
                f'candidate {spec.name}: {SCOPES[task]} has no such model for task {task}; choose '
                f'from {", ".join(stock)}'
            )
    if task == 'pose' and any(spec.base.startswith('vit') for spec in specs):
        needed['mmpretrain'] = 'ViTPose'
    for scope, who in needed.items():
        if importlib.util.find_spec(scope) is None:
            raise BenchmarkError(
                f'{who} needs {PACKAGES[scope]}, which is not installed: '
                f'pip install {PACKAGES[scope]}'
            )
    try:
        find_config(CONFIGS[task].format(arch))
    except FileNotFoundError as err:
        raise BenchmarkError(f'no shipped config for task {task}, arch {arch}: {err}') from None


class Network(nn.Module):
    """Backbone, neck and heads of a model of any of the frameworks, without pre-processing.

    Args:
        model (nn.Module): A classifier, pose estimator or segmentor.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.neck = getattr(model, 'neck', None)
        heads = model.decode_head if hasattr(model, 'decode_head') else model.head
        self.heads = heads if isinstance(heads, nn.ModuleList) else nn.ModuleList([heads])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute heatmaps, class scores, or the logits of each segmentation head."""
        streams = self.backbone(images)
        if self.neck is not None:
            streams = self.neck(streams)
        first, *others = self.heads
        outs = [first(streams)]
        for head in others:
            outs.append(head(streams, outs[-1]))
        return tuple(outs)


def stock_path(scope: str, name: str) -> Path:
    """Find a config that a framework ships.

    Args:
        scope (str): The framework's package.
        name (str): The config's path below the framework's configs.

    Returns:
        Path: The config.

    Raises:
        BenchmarkError: If the framework is not installed, or has no such config.
    """
    spec = importlib.util.find_spec(scope)
    if spec is None:
        raise BenchmarkError(f'{PACKAGES[scope]} is not installed: {how_to_install(scope)}')
    configs = Path(spec.origin).parent / '.mim/configs'
    if not (configs / name).is_file():
        raise BenchmarkError(f'{configs} has no {name}: reinstall {PACKAGES[scope]}')
    return configs / name


def mmpose_backbone(ours: ConfigDict) -> dict:
    """The config of mmpose's HRFormer that computes the same as ours.

    Args:
        ours (ConfigDict): The config of our backbone.

    Returns:
        dict: The config of mmpose's, which builds in any scope.
    """
    arch, upsample = parse_arch(ours.arch), ours.get('upsample', 'nearest')
    stages = {}
    for streams, num_modules in enumerate(arch['num_modules'], start=2):
        stages[f'stage{streams}'] = dict(
            num_modules=num_modules,
            num_branches=streams,
            block='HRFORMERBLOCK',
            num_blocks=(arch['num_blocks'],) * streams,
            num_channels=arch['channels'][:streams],
            num_heads=list(arch['num_heads'][:streams]),
            mlp_ratios=[arch['mlp_ratio']] * streams,
            window_sizes=[ours.get('window_size', 7)] * streams,
        )
    stages['stage4']['multiscale_output'] = tuple(ours.get('out_indices', range(4))) != (0,)
    stem = dict(num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(2,))
    extra = dict(
        drop_path_rate=ours.get('drop_path_rate', 0.0),
        with_rpe=ours.get('with_rpe', True),
        upsample=dict(mode=upsample, align_corners=None if upsample == 'nearest' else False),
        stage1=dict(**stem, num_channels=(64,), num_heads=[2], num_mlp_ratios=[4]),
        **stages,
    )
    norm_cfg = ours.get('norm_cfg', dict(type='BN'))
    return dict(type='mmpose.HRFormer', in_channels=3, norm_cfg=norm_cfg, extra=extra)


def load_weights(model: nn.Module, spec: Spec, weights: dict[str, Tensor]) -> None:
    """Load the tensors of our model, with mmpose's backbone by its names; all, and no others.

    Args:
        model (nn.Module): Our model, or that with mmpose's backbone.
        spec (Spec): The candidate.
        weights (dict[str, Tensor]): The tensors by our names.

    Raises:
        RuntimeError: If a tensor is missing or left over.
    """
    if spec.base == 'mmpose':
        backbone = to_dialect(weights, 'mmpose', backbone_only=True)
        rest = {k: v for k, v in weights.items() if not k.startswith('backbone.')}
        weights = {**{f'backbone.{k}': v for k, v in backbone.items()}, **rest}
    model.load_state_dict(weights)


def model_config(
    spec: Spec, task: str, arch: str, size: tuple[int, int], window: int | None, drop: bool
) -> Config:
    """The config of a candidate.

    Args:
        spec (Spec): The candidate.
        task (str): ``'pose'``, ``'cls'`` or ``'seg'``.
        arch (str): The architecture of ours.
        size (tuple[int, int]): Height and width of the images, for what depends on them.
        window (int, optional): Side of HRFormer's windows, if not the config's.
        drop (bool): Whether to keep the config's stochastic depth.

    Returns:
        Config: The config, without weights to download.
    """
    if spec.base in SAME_WEIGHTS:
        cfg = Config.fromfile(find_config(CONFIGS[task].format(arch)))
    else:
        cfg = Config.fromfile(stock_path(SCOPES[task], STOCK[task, spec.base]))
    backbone = cfg.model.backbone
    backbone.init_cfg = None
    if not drop and 'drop_path_rate' in backbone:
        backbone.drop_path_rate = 0.0
    if window and spec.base in SAME_WEIGHTS:
        backbone.window_size = window
    if spec.has('with-cp'):
        backbone.with_cp = True
    if spec.base == 'mmpose':
        cfg.model.backbone = mmpose_backbone(backbone)
    if spec.base.startswith('vit'):
        # At other sizes position embeddings are interpolated in every forward pass.
        backbone.img_size = size
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config on the CPU, with random weights.

    Args:
        cfg (Config): The config.

    Returns:
        nn.Module: The classifier, pose estimator or segmentor.
    """
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return revert_sync_batchnorm(MODELS.build(cfg.model))


def make_weights(task: str, arch: str, window: int | None, seed: int = 0) -> dict[str, Tensor]:
    """Make the random weights that ours and mmpose's share.

    Statistics and scales of the norms are random, too: with those of a new model a wrong folding
    of batch normalization would not show.

    Args:
        task (str): ``'pose'``, ``'cls'`` or ``'seg'``.
        arch (str): The architecture.
        window (int, optional): Side of the windows, if not the config's.
        seed (int): What the random numbers follow from. Defaults to 0.

    Returns:
        dict[str, Tensor]: The tensors of our model by name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(model_config(parse_spec('ours'), task, arch, (0, 0), window, False))
        for module in model.modules():
            if isinstance(module, (_BatchNorm, nn.LayerNorm)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.state_dict()


def build_network(spec: Spec, cfg: Config, weights: dict[str, Tensor], drop: bool) -> Network:
    """Build a candidate's network on the CPU, in evaluation mode.

    Args:
        spec (Spec): The candidate.
        cfg (Config): Its config, see :func:`model_config`.
        weights (dict[str, Tensor]): Tensors of our model; other models keep random weights.
        drop (bool): Whether to keep the dropout of its heads.

    Returns:
        Network: The network.
    """
    model = build_model(cfg)
    if spec.base in SAME_WEIGHTS:
        load_weights(model, spec, weights)
    if not drop:
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0
    model.train(False)  # the eval() of mmpose's HRFormer returns nothing
    if spec.has('fused'):
        model = fuse_for_inference(model)
    return Network(model)

"""The models that ``tools/benchmark.py`` compares.

A candidate is a model, optionally with suffixes for how it is run: ``ours``,
``ours-fused-compiled``, ``mmpose-nchw``, ``hrnet-w32-compiled``.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mmhrformer import ops
from mmhrformer.apis import fuse_for_inference
from mmhrformer.checkpoints import to_dialect
from mmhrformer.configs import PACKAGES, find_config
from mmhrformer.deploy.onnx import require_packages
from mmhrformer.models.hrformer import parse_arch
from mmhrformer.utils.install_hints import how_to_install

# Our configs, and the frameworks that build them.
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
    ('pose', 'swin-t'): f'{POSE}swin-t-p4-w7_8xb32-210e_coco-256x192.py',
    ('pose', 'swin-b'): f'{POSE}swin-b-p4-w7_8xb32-210e_coco-256x192.py',
    ('pose', 'rtmpose-m'): 'body_2d_keypoint/rtmpose/coco/rtmpose-m_8xb256-420e_coco-256x192.py',
    ('cls', 'hrnet-w32'): 'hrnet/hrnet-w32_4xb32_in1k.py',
    ('cls', 'hrnet-w48'): 'hrnet/hrnet-w48_4xb32_in1k.py',
    ('cls', 'vit-s'): 'deit/deit-small_4xb256_in1k.py',
    ('cls', 'vit-b'): 'deit/deit-base_16xb64_in1k.py',
    ('seg', 'hrnet-w48'): 'ocrnet/ocrnet_hr48_4xb2-80k_cityscapes-512x1024.py',
}

SAME_WEIGHTS = ('ours', 'mmpose')
BASES = (*SAME_WEIGHTS, *dict.fromkeys(base for _, base in STOCK))
SUFFIXES = {
    'fused': 'ours only: mmhrformer.apis.fuse_for_inference',
    'padded': 'fused only: zero channels for Triton kernels, see fuse_for_inference',
    'with-cp': 'ours only, training: recompute blocks in the backward pass',
    'compiled': 'torch.compile, see --compile-mode',
    'cudagraph': 'CUDA inference: one captured CUDA graph',
    'nchw': 'contiguous images and weights, despite --channels-last',
    'onnx': 'CPU inference, fp32: exported to an ONNX file, run by onnxruntime',
    'openvino': 'the same file, run by OpenVINO',
}
RUNTIMES = {'onnx': 'onnxruntime', 'openvino': 'openvino'}


class BenchmarkError(ValueError):
    """A request that cannot be measured; the message has the remedy."""


class Spec(NamedTuple):
    """A candidate: its name, one of :data:`BASES`, and some of :data:`SUFFIXES`."""

    name: str
    base: str
    suffixes: frozenset[str]

    def has(self, suffix: str) -> bool:
        """Whether the name has a suffix."""
        return suffix in self.suffixes

    @property
    def runtime(self) -> str:
        """The suffix of the runtime of an exported file, or an empty string."""
        return next(filter(self.has, RUNTIMES), '')


def parse_spec(name: str) -> Spec:
    """Parse the name of a candidate.

    Args:
        name (str): One of :data:`BASES`, optionally followed by some of :data:`SUFFIXES`, each
            with a ``-`` before it.

    Returns:
        Spec: The candidate.

    Raises:
        BenchmarkError: If the name is unknown or contradicts itself.

    Examples:
        >>> parse_spec('ours-fused-compiled').base
        'ours'
    """
    match = re.fullmatch(f'({"|".join(BASES)})((-({"|".join(SUFFIXES)}))*)', name)
    if not match:
        raise BenchmarkError(
            f'there is no candidate {name!r}: choose one of {", ".join(BASES)}, followed by any '
            f'of {", ".join("-" + suffix for suffix in SUFFIXES)}'
        )
    spec = Spec(name, match[1], frozenset(re.findall('|'.join(SUFFIXES), match[2])))
    for suffix in ('fused', 'with-cp'):
        if spec.has(suffix) and spec.base != 'ours':
            raise BenchmarkError(f'candidate {name!r}: only ours can be {suffix}')
    if spec.has('padded') and not spec.has('fused'):
        raise BenchmarkError(f'candidate {name!r}: only fused models can be padded')
    if spec.runtime and len(spec.suffixes) > 1:
        raise BenchmarkError(
            f'candidate {name!r}: {spec.runtime} cannot be combined with other suffixes'
        )
    return spec


def why_unavailable(spec: Spec, mode: str, device: str, dtype: str = 'fp32') -> str:
    """The reason why a candidate cannot be measured, or an empty string if it can."""
    if spec.runtime and (mode, device, dtype) != ('infer', 'cpu', 'fp32'):
        return 'exported files are measured with --mode infer, --device cpu, --dtype fp32 only'
    if spec.has('fused') and mode == 'train':
        return 'fused models cannot be trained'
    if spec.has('with-cp') and mode == 'infer':
        return 'nothing is recomputed in inference'
    if spec.has('cudagraph') and mode == 'train':
        return 'CUDA graphs are captured for inference only'
    if spec.has('cudagraph') and device != 'cuda':
        return 'CUDA graphs need --device cuda'
    return ''


def check_models(task: str, arch: str, specs: list[Spec]) -> None:
    """Check that the models exist and that their frameworks are installed."""
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
    if any(spec.base.startswith('rtmpose') for spec in specs):
        needed['mmdet'] = "RTMPose's backbone"
    runtimes = {RUNTIMES[spec.runtime] for spec in specs if spec.runtime}
    if runtimes:
        try:
            require_packages(verify='onnxruntime' in runtimes)
        except ImportError as err:
            raise BenchmarkError(str(err)) from None
    if 'openvino' in runtimes and importlib.util.find_spec('openvino') is None:
        raise BenchmarkError('OpenVINO is not installed: pip install openvino')
    for scope, who in needed.items():
        if importlib.util.find_spec(scope) is None:
            raise BenchmarkError(
                f'{who} needs {PACKAGES[scope]}, which is not installed: {how_to_install(scope)}'
            )
    try:
        find_config(CONFIGS[task].format(arch))
    except FileNotFoundError as err:
        raise BenchmarkError(f'no shipped config for task {task}, arch {arch}: {err}') from None


class Network(nn.Module):
    """Backbone, neck and heads of a model of any of the frameworks, without preprocessing.

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


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force a backend of the operators, even ``'kernels'`` where Triton cannot run."""
    with mock.patch.object(ops.dispatch, 'why_not', return_value=''), ops.use(backend):
        yield


def fold(model: nn.Module, padded: bool) -> nn.Module:
    """Fold a model; with ``padded``, for Triton's kernels, even on a CPU."""
    with use('kernels') if padded else nullcontext():
        return fuse_for_inference(model, pad_channels=padded)


def stock_path(scope: str, name: str) -> Path:
    """The path of a framework's config, given its path relative to the framework's configs."""
    configs = Path(importlib.util.find_spec(scope).origin).parent / '.mim/configs'
    if not (configs / name).is_file():
        raise BenchmarkError(f'{configs} has no {name}: reinstall {PACKAGES[scope]}')
    return configs / name


def mmpose_backbone(ours: ConfigDict) -> dict:
    """The config of mmpose's HRFormer equivalent to ours; it builds in any scope."""
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


def model_config(
    spec: Spec, task: str, arch: str, size: tuple[int, int], window: int | None, drop: bool
) -> Config:
    """The config of a candidate, without weights to download; see :func:`build_network`."""
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
    """Build the model of a config on the CPU, with random weights."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return revert_sync_batchnorm(MODELS.build(cfg.model))


@cache
def make_weights(task: str, arch: str, window: int | None) -> dict[str, Tensor]:
    """Random weights shared by our model and mmpose's, by our names.

    Statistics and scales of the norms are random as well: with those of a new model, errors in
    folding batch normalization would not show.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(model_config(parse_spec('ours'), task, arch, (0, 0), window, False))
        for module in model.modules():
            if isinstance(module, (_BatchNorm, nn.LayerNorm)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.state_dict()


def build_network(
    spec: Spec,
    task: str,
    arch: str,
    size: tuple[int, int],
    window: int | None = None,
    drop: bool = False,
) -> Network:
    """Build a candidate's network on the CPU, in evaluation mode.

    Our model and mmpose's get the same weights, :func:`make_weights`; others have random ones.

    Args:
        spec (Spec): The candidate.
        task (str): ``'pose'``, ``'cls'`` or ``'seg'``.
        arch (str): Architecture of our model and mmpose's.
        size (tuple[int, int]): Height and width of the images, for models that depend on them.
        window (int, optional): Side of HRFormer's windows, if not the config's.
        drop (bool): Whether to keep the config's stochastic depth and dropout. Defaults to False.

    Returns:
        Network: The network.
    """
    model = build_model(model_config(spec, task, arch, size, window, drop))
    if spec.base in SAME_WEIGHTS:
        weights = make_weights(task, arch, window)
        if spec.base == 'mmpose':
            backbone = to_dialect(weights, 'mmpose', backbone_only=True)
            rest = {k: v for k, v in weights.items() if not k.startswith('backbone.')}
            weights = {**{f'backbone.{k}': v for k, v in backbone.items()}, **rest}
        model.load_state_dict(weights)
    if not drop:
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0
    model.train(False)  # the eval() of mmpose's HRFormer returns nothing
    if spec.has('fused'):
        model = fold(model, spec.has('padded'))
    return Network(model)

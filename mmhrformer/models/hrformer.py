"""HRFormer: High-Resolution Transformer for Dense Prediction (NeurIPS 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from numbers import Integral, Real
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule, ModuleList, Sequential
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoints.dialects import adapt_backbone_keys
from ..ops.state import converts
from ..registry import MODELS
from .block import Bottleneck, HRFormerBlock
from .checks import as_indices, check_norm_cfg
from .hr_module import HRModule

NUM_STREAMS = 4
STEM_CHANNELS = 64
MIN_INPUT = 32  # pixels a side: the coarsest stream then has one token

# Paper, Table 2. `channels` and `num_heads` count the four streams, `num_modules` the stages 2, 3
# and 4; every module has `num_blocks` blocks on each of its streams.
ARCHS = {
    'tiny': dict(
        channels=(18, 36, 72, 144),
        num_heads=(1, 2, 4, 8),
        num_modules=(1, 3, 2),
        num_blocks=2,
        mlp_ratio=4,
    ),
    'small': dict(
        channels=(32, 64, 128, 256),
        num_heads=(1, 2, 4, 8),
        num_modules=(1, 4, 2),
        num_blocks=2,
        mlp_ratio=4,
    ),
    'base': dict(
        channels=(78, 156, 312, 624),
        num_heads=(2, 4, 8, 16),
        num_modules=(1, 4, 2),
        num_blocks=2,
        mlp_ratio=4,
    ),
}


def is_whole(value: Any, low: int, high: float = math.inf) -> bool:
    """Whether a value is a whole number between two bounds, both included."""
    return isinstance(value, Integral) and low <= value <= high


def parse_arch(arch: str | dict) -> dict:
    """Look an architecture up, or check one that is spelled out.

    Args:
        arch (str | dict): A key of :data:`ARCHS`, or a dict with the same fields;
            ``num_blocks`` and ``mlp_ratio`` may be left out (2 and 4).

    Returns:
        dict: The five fields of :data:`ARCHS`.

    Raises:
        ValueError: If the name or a field is unknown, a field is missing, a list has the wrong
            length, a number is not whole or below 1, or heads do not divide channels.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'arch={arch!r} is unknown: choose one of {list(ARCHS)} or a dict')
        return dict(ARCHS[arch])
    if not isinstance(arch, Mapping):
        raise ValueError(f'arch={arch!r}: choose one of {list(ARCHS)} or a dict with their fields')
    fields = {'num_blocks': 2, 'mlp_ratio': 4, **arch}
    names = set(ARCHS['tiny'])
    if set(fields) != names:
        raise ValueError(
            f'arch={dict(arch)!r}: unknown fields {sorted(set(fields) - names)}, missing fields '
            f'{sorted(names - set(fields))}; an arch has the fields {sorted(names)}'
        )
    _check_numbers(fields)
    for name in ('channels', 'num_heads', 'num_modules'):
        fields[name] = tuple(fields[name])
    for channels, heads in zip(fields['channels'], fields['num_heads']):
        if channels % heads:
            raise ValueError(
                f"arch['num_heads']={fields['num_heads']} does not divide "
                f"arch['channels']={fields['channels']}: {heads} heads cannot share {channels} "
                'channels'
            )
    return fields


def _check_numbers(fields: Mapping) -> None:
    """Check every field of an architecture for itself."""
    lengths = dict(channels=NUM_STREAMS, num_heads=NUM_STREAMS, num_modules=NUM_STREAMS - 1)
    for name, length in lengths.items():
        value = fields[name]
        good = isinstance(value, Sequence) and len(value) == length
        if not good or not all(is_whole(number, 1) for number in value):
            raise ValueError(
                f'arch[{name!r}]={value!r}: give {length} numbers of at least 1, all whole'
            )
    blocks, ratio = fields['num_blocks'], fields['mlp_ratio']
    if not is_whole(blocks, 1):
        raise ValueError(f"arch['num_blocks']={blocks!r}: give a whole number above 0")
    # Of the narrowest stream at least one hidden channel has to be left.
    if not (isinstance(ratio, Real) and 1 <= ratio * min(fields['channels']) < math.inf):
        raise ValueError(f"arch['mlp_ratio']={ratio!r}: give a number above 0, such as 4")


def conv_norm_relu(
    in_channels: int, out_channels: int, stride: int, norm_cfg: dict
) -> tuple[nn.Module, ...]:
    """3x3 convolution, normalization and ReLU, as a tuple of modules."""
    return (
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        build_norm_layer(norm_cfg, out_channels)[1],
        nn.ReLU(inplace=True),
    )


@MODELS.register_module()
class HRFormer(BaseModule):
    """High-Resolution Transformer, a backbone for dense prediction.

    A stem and two bottlenecks bring the image to 1/4 of its size. Three stages follow with 2, 3
    and 4 parallel streams at 1/4, 1/8, 1/16 and 1/32; each stage repeats a module of transformer
    blocks and an exchange between all streams. Any input of at least 32x32 pixels works.
    Checkpoints of the official codes and of mmpose load as they are, also with another window.

    Args:
        arch (str | dict): ``'tiny'``, ``'small'``, ``'base'`` (paper, Table 2), or a dict with
            the fields of :data:`ARCHS`. Defaults to ``'small'``.
        in_channels (int): Channels of the image. Defaults to 3.
        window_size (int | Sequence[int]): Side of the attention windows in tokens, for all
            streams or for each of the four. Defaults to 7 (paper, Section 3).
        drop_path_rate (float): Stochastic depth rate of the last block; it rises linearly from
            0 over the blocks. Defaults to 0.
        attn_cfg (dict | Sequence[dict]): The registered attention of the blocks, with its own
            options; or several, which take turns from the first block to the last. Defaults to
            ``dict(type='mmhrformer.LocalWindowSelfAttention')``.
        ffn_cfg (dict): The registered FFN of the blocks, with its own options. Defaults to
            ``dict(type='mmhrformer.DWConvFFN')``.
        with_rpe (bool): Whether attention has a relative position bias. Defaults to True.
        pad_mask (bool): Whether attention ignores the padding of incomplete windows. Official
            checkpoints were trained without. Defaults to False.
        upsample (str): How coarse streams are enlarged in the exchange: ``'nearest'`` as in the
            official classification and segmentation codes, ``'bilinear'`` as in pose.
            Defaults to ``'nearest'``.
        out_indices (int | Sequence[int]): Streams to return, 0 is the finest, -1 the coarsest.
            What only the others would need is neither computed nor stored. Defaults to
            (0, 1, 2, 3).
        frozen_stages (int): Stages to freeze, their statistics included: -1 none, 0 the stem,
            1 also layer1 and transition1, up to 4. Defaults to -1.
        norm_eval (bool): Whether batch normalization keeps its running statistics in training.
            Defaults to False.
        with_cp (bool): Whether transformer blocks recompute their activations in the backward
            pass to save memory. Defaults to False.
        norm_cfg (dict): Config of the normalization. Defaults to ``dict(type='BN')``.
        init_cfg (dict | list[dict], optional): Initialization config of mmengine.

    Raises:
        ValueError: If an argument is not possible; the message names it and what is.

    Examples:
        >>> model = HRFormer(arch='tiny')
        >>> [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 96))]
        [(1, 18, 16, 24), (1, 36, 8, 12), (1, 72, 4, 6), (1, 144, 2, 3)]
    """

    def __init__(
        self,
        arch: str | dict = 'small',
        in_channels: int = 3,
        window_size: int | Sequence[int] = 7,
        drop_path_rate: float = 0.0,
        attn_cfg: dict | Sequence[dict] = dict(type='mmhrformer.LocalWindowSelfAttention'),
        ffn_cfg: dict = dict(type='mmhrformer.DWConvFFN'),
        with_rpe: bool = True,
        pad_mask: bool = False,
        upsample: str = 'nearest',
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        norm_cfg: dict = dict(type='BN'),
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.arch = parse_arch(arch)
        self.in_channels = in_channels
        self.window_sizes = self._per_stream(window_size)
        # Counted from the end where negative, as everywhere in Python.
        self.out_indices = tuple(
            index + NUM_STREAMS if is_whole(index, -NUM_STREAMS, -1) else index
            for index in as_indices(out_indices)
        )
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_rpe = with_rpe
        self.upsample = upsample
        self.norm_cfg = norm_cfg
        self._check_options(drop_path_rate)
        # What all blocks have in common.
        self._block_cfg = dict(
            mlp_ratio=self.arch['mlp_ratio'],
            with_rpe=with_rpe,
            pad_mask=pad_mask,
            ffn_cfg=ffn_cfg,
            norm_cfg=norm_cfg,
            with_cp=with_cp,
        )
        self._build_stem()
        self._build_stages(drop_path_rate, attn_cfg)
        self._freeze_stages()

    @staticmethod
    def _per_stream(window_size: int | Sequence[int]) -> tuple[int, ...]:
        sizes = window_size if isinstance(window_size, Sequence) else (window_size,) * NUM_STREAMS
        if len(sizes) != NUM_STREAMS or not all(is_whole(size, 1) for size in sizes):
            raise ValueError(
                f'window_size={window_size!r}: give one side of at least 1 token, a whole number, '
                f'or one for each of the {NUM_STREAMS} streams'
            )
        return tuple(sizes)

    def _check_options(self, drop_path_rate: float) -> None:
        streams = range(NUM_STREAMS)
        indices = self.out_indices
        known = all(is_whole(index, 0, NUM_STREAMS - 1) for index in indices)
        if not indices or not known or len(set(indices)) < len(indices):
            raise ValueError(f'out_indices={indices}: choose some of the streams {tuple(streams)}')
        if self.upsample not in ('nearest', 'bilinear'):
            raise ValueError(f"upsample={self.upsample!r}: choose 'nearest' or 'bilinear'")
        if not is_whole(self.frozen_stages, -1, NUM_STREAMS):
            raise ValueError(f'frozen_stages={self.frozen_stages!r}: choose -1 to {NUM_STREAMS}')
        if not (isinstance(drop_path_rate, Real) and 0 <= drop_path_rate < 1):
            raise ValueError(f'drop_path_rate={drop_path_rate!r}: choose a number in [0, 1)')
        if not is_whole(self.in_channels, 1):
            raise ValueError(
                f'in_channels={self.in_channels!r}: give a whole number, an image has at least 1 '
                'channel'
            )
        widths = (STEM_CHANNELS, STEM_CHANNELS * Bottleneck.expansion, *self.arch['channels'])
        check_norm_cfg(self.norm_cfg, widths)

    def _build_stem(self) -> None:
        width = STEM_CHANNELS
        self.conv1, self.bn1, _ = conv_norm_relu(self.in_channels, width, 2, self.norm_cfg)
        self.conv2, self.bn2, _ = conv_norm_relu(width, width, 2, self.norm_cfg)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = Sequential(
            Bottleneck(width, width, norm_cfg=self.norm_cfg),
            Bottleneck(width * Bottleneck.expansion, width, norm_cfg=self.norm_cfg),
        )

    def _build_stages(self, drop_path_rate: float, attn_cfg: dict | Sequence[dict]) -> None:
        """Transitions and stages 2 to 4; the drop path rate rises from block to block."""
        num_modules, num_blocks = self.arch['num_modules'], self.arch['num_blocks']
        attn_cfgs = attn_cfg if isinstance(attn_cfg, (list, tuple)) else [attn_cfg]
        if not attn_cfgs:
            raise ValueError(f'attn_cfg={attn_cfg!r}: give the config of an attention, or several')
        total = sum(num_modules) * num_blocks
        rates = torch.linspace(0, drop_path_rate, total, device='cpu').tolist()
        blocks = [dict(drop_path_rate=r, attn_cfg=a) for r, a in zip(rates, cycle(attn_cfgs))]
        channels = (STEM_CHANNELS * Bottleneck.expansion,)
        for stage, modules in enumerate(num_modules, start=2):
            streams = self.arch['channels'][:stage]
            setattr(self, f'transition{stage - 1}', self._build_transition(channels, streams))
            stage_blocks = [blocks.pop(0) for _ in range(modules * num_blocks)]
            setattr(self, f'stage{stage}', self._build_stage(stage, modules, stage_blocks))
            channels = streams

    def _build_transition(self, before: Sequence[int], after: Sequence[int]) -> ModuleList:
        """One more, half-size stream; the others pass unless their channels change."""
        layers = []
        for i, channels in enumerate(after):
            if i >= len(before):
                new = Sequential(*conv_norm_relu(before[-1], channels, 2, self.norm_cfg))
                layers.append(Sequential(new))
            elif before[i] != channels:
                layers.append(Sequential(*conv_norm_relu(before[i], channels, 1, self.norm_cfg)))
            else:
                layers.append(nn.Identity())
        return ModuleList(layers)

    def _build_stage(self, stage: int, num_modules: int, blocks: Sequence[dict]) -> Sequential:
        """A stage of modules on its first ``stage`` streams; ``blocks``: options of its blocks."""
        channels = self.arch['channels'][:stage]
        num_blocks = self.arch['num_blocks']
        modules = []
        for m in range(num_modules):
            module_blocks = blocks[m * num_blocks : (m + 1) * num_blocks]
            last = stage == NUM_STREAMS and m == num_modules - 1
            branches = [self._build_branch(i, module_blocks) for i in range(stage)]
            out_streams = self.out_indices if last else range(stage)
            modules.append(HRModule(branches, channels, out_streams, self.upsample, self.norm_cfg))
        return Sequential(*modules)

    def _build_branch(self, stream: int, blocks: Sequence[dict]) -> Sequential:
        """The blocks of one stream in one module."""
        channels, heads = self.arch['channels'][stream], self.arch['num_heads'][stream]
        window = self.window_sizes[stream]
        return Sequential(
            *(
                HRFormerBlock(channels, heads, window, **options, **self._block_cfg)
                for options in blocks
            )
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature streams of images.

        Args:
            x (Tensor): Images of shape (B, in_channels, H, W), H and W at least 32 pixels.

        Returns:
            tuple[Tensor, ...]: For each i of ``out_indices`` the stream of shape
            (B, channels[i], ceil(H / 2**(i + 2)), ceil(W / 2**(i + 2))), in the memory format of
            the convolutions before them: that of the images and of the weights.

        Raises:
            TypeError: If the input is no tensor, or of another data type than the weights.
            ValueError: If the input has another shape or is too small.
        """
        self._check_input(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.layer1(x)  # (B, 256, H / 4, W / 4)
        is_contiguous = x.is_contiguous()
        xs = [x]
        for stage in range(2, NUM_STREAMS + 1):
            transition = getattr(self, f'transition{stage - 1}')
            finest, coarsest = xs, xs[-1]
            xs = [
                layer(finest[i] if i < len(finest) else coarsest)
                for i, layer in enumerate(transition)
            ]
            xs = getattr(self, f'stage{stage}')(xs)
        # The blocks work in channels-last.
        return tuple(xs[i].contiguous() if is_contiguous else xs[i] for i in self.out_indices)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f'HRFormer got {type(x).__name__} as input: give a tensor of images, '
                f'(B, {self.in_channels}, H, W)'
            )
        dtype = next(self.parameters()).dtype
        if x.dtype != dtype and not converts(x):
            raise TypeError(
                f'HRFormer got an input of {x.dtype}, its weights are {dtype}: normalize the '
                f'images, which the data_preprocessor of a model does, and call .to({dtype})'
            )
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'HRFormer got an input of shape {tuple(x.shape)}: give images of shape '
                f'(B, {self.in_channels}, H, W), or set in_channels'
            )
        if x.shape[2] < MIN_INPUT or x.shape[3] < MIN_INPUT:
            raise ValueError(
                f'HRFormer got images of {x.shape[2]}x{x.shape[3]} pixels: resize or pad them to '
                f'at least {MIN_INPUT}x{MIN_INPUT}'
            )

    def _freeze_stages(self) -> None:
        frozen = []
        if self.frozen_stages >= 0:
            frozen += [self.conv1, self.bn1, self.conv2, self.bn2]
        if self.frozen_stages >= 1:
            frozen += [self.layer1, self.transition1]
        for stage in range(2, self.frozen_stages + 1):
            frozen.append(getattr(self, f'stage{stage}'))
            if stage < NUM_STREAMS:
                frozen.append(getattr(self, f'transition{stage}'))
        for module in frozen:
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad = False

    def train(self, mode: bool = True) -> HRFormer:
        """Set the mode; frozen stages, and with ``norm_eval`` all statistics, stay in eval."""
        super().train(mode)
        if mode:
            self._freeze_stages()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter, for layer-wise learning rate decay.

        The stem, layer1 and transition1 are layer 0; then every block counts, with the parallel
        streams side by side. A transition belongs to the first block after it, an exchange to
        the last block before it, whatever is not in the backbone to the last layer.

        Args:
            param_name (str): Name of the parameter.
            prefix (str): Prefix of the backbone's parameters. Defaults to ''.

        Returns:
            tuple[int, int]: Depth of the parameter's layer and number of layers.
        """
        num_blocks = self.arch['num_blocks']
        num_layers = sum(self.arch['num_modules']) * num_blocks + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        parts = param_name[len(prefix) :].split('.')
        if parts[0] in ('transition2', 'transition3'):
            stage, block = int(parts[0][-1]) + 1, 0
        elif parts[0].startswith('stage'):
            stage = int(parts[0][-1])
            # stage3.<module>.branches.<stream>.<block>... or stage3.<module>.fuse_layers...
            in_module = int(parts[4]) if parts[2] == 'branches' else num_blocks - 1
            block = int(parts[1]) * num_blocks + in_module
        else:
            return 0, num_layers
        blocks_before = sum(self.arch['num_modules'][: stage - 2]) * num_blocks
        return 1 + blocks_before + block, num_layers

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Every way to load a checkpoint passes here, so every dialect is understood everywhere.
        adapt_backbone_keys(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args)

"""HRFormer: High-Resolution Transformer for Dense Prediction (NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, cycle, islice

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule, ModuleList, Sequential
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoints.contents import plain_name
from ..checkpoints.dialects import adapt_backbone_keys
from ..registry import MODELS
from . import checks
from .block import Bottleneck, HRFormerBlock
from .hr_module import HRModule

STEM_CHANNELS = 64
STAGE1_CHANNELS = STEM_CHANNELS * Bottleneck.expansion
LAYER_0 = ('conv1', 'bn1', 'conv2', 'bn2', 'layer1', 'transition1')  # see get_layer_depth

# Paper, Table 2: channels and heads of the four streams, modules of stages 2, 3 and 4. Each module
# has two blocks per stream.
ARCHS = {
    name: dict(channels=channels, num_heads=heads, num_modules=modules, num_blocks=2, mlp_ratio=4)
    for name, channels, heads, modules in (
        ('tiny', (18, 36, 72, 144), (1, 2, 4, 8), (1, 3, 2)),
        ('small', (32, 64, 128, 256), (1, 2, 4, 8), (1, 4, 2)),
        ('base', (78, 156, 312, 624), (2, 4, 8, 16), (1, 4, 2)),
    )
}


def parse_arch(arch: str | dict) -> dict:
    """Look up an architecture by name, or validate a custom one.

    Args:
        arch (str | dict): A key of :data:`ARCHS`, or a dict with the same fields;
            ``num_blocks`` and ``mlp_ratio`` may be left out (2 and 4).

    Returns:
        dict: The five fields of :data:`ARCHS`.

    Raises:
        ValueError: If the name or a field is unknown, a field is missing, a list has the wrong
            length, a number is not a positive integer, or heads do not divide channels.
    """
    if isinstance(arch, str) and arch in ARCHS:
        return dict(ARCHS[arch])
    if not isinstance(arch, Mapping):
        raise ValueError(f'arch={arch!r}: choose one of {list(ARCHS)} or pass a dict of its fields')
    return checks.complete_arch(arch)


def conv_norm_relu(
    in_channels: int, out_channels: int, stride: int, norm_cfg: dict
) -> tuple[nn.Module, ...]:
    """A 3x3 convolution, normalization and ReLU, as a tuple of modules."""
    return (
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        build_norm_layer(norm_cfg, out_channels)[1],
        nn.ReLU(inplace=True),
    )


@MODELS.register_module()
class HRFormer(BaseModule):
    """High-Resolution Transformer, a backbone for dense prediction.

    A stem and two bottlenecks reduce the image to 1/4 of its size. Three stages follow with 2, 3
    and 4 parallel streams at 1/4, 1/8, 1/16 and 1/32; each stage repeats a module of transformer
    blocks and an exchange between all streams. Any input of at least 32x32 pixels works.
    Checkpoints of the official codes and of mmpose load directly, even with another window size.

    Args:
        arch (str | dict): ``'tiny'``, ``'small'``, ``'base'`` (paper, Table 2), or a dict with
            the fields of :data:`ARCHS`. Defaults to ``'small'``.
        in_channels (int): Channels of the image. Defaults to 3.
        window_size (int | Sequence[int]): Side of the attention windows in tokens, one for all
            streams or one per stream. Defaults to 7 (paper, Section 3).
        drop_path_rate (float): Stochastic depth rate of the last block; it rises linearly from
            0 over the blocks. Defaults to 0.
        attn_cfg (dict | Sequence[dict]): The registered attention of the blocks, with its own
            options; several of them alternate from block to block. Defaults to
            ``dict(type='mmhrformer.LocalWindowSelfAttention')``.
        ffn_cfg (dict): The registered FFN of the blocks, with its own options. Defaults to
            ``dict(type='mmhrformer.DWConvFFN')``.
        with_rpe (bool): Whether attention has a relative position bias. Defaults to True.
        pad_mask (bool): Whether attention ignores the padding of incomplete windows. The official
            checkpoints were trained without it. Defaults to False.
        upsample (str): How coarse streams are enlarged in the exchange: ``'nearest'`` as in the
            official classification and segmentation codes, ``'bilinear'`` as in the pose code.
            Defaults to ``'nearest'``.
        out_indices (int | Sequence[int]): Streams to return, 0 is the finest, -1 the coarsest.
            Layers that only other streams need are not built. Defaults to (0, 1, 2, 3).
        frozen_stages (int): Stages to freeze, including their statistics: -1 for none, 0 for the
            stem, 1 to also freeze layer1 and transition1, up to 4. Defaults to -1.
        norm_eval (bool): Whether batch normalization uses its running statistics in training.
            Defaults to False.
        with_cp (bool): Whether transformer blocks recompute their activations in the backward
            pass to save memory. Defaults to False.
        norm_cfg (dict): Config of the normalization. Defaults to ``dict(type='BN')``.
        init_cfg (dict | list[dict], optional): Initialization config of mmengine.

    Raises:
        ValueError: If an argument is invalid; the message names it and the valid values.

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
        checks.check_backbone(in_channels, drop_path_rate, upsample, frozen_stages)
        checks.check_flags(
            with_rpe=with_rpe, pad_mask=pad_mask, norm_eval=norm_eval, with_cp=with_cp
        )
        self.arch = parse_arch(arch)
        self.in_channels = in_channels
        self.window_sizes = checks.window_per_stream(window_size)
        self.out_indices = checks.stream_indices(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_rpe = with_rpe
        self.upsample = upsample
        self.norm_cfg = norm_cfg
        checks.check_norm_cfg(norm_cfg, (STEM_CHANNELS, STAGE1_CHANNELS, *self.arch['channels']))
        options = dict(with_rpe=with_rpe, pad_mask=pad_mask, ffn_cfg=ffn_cfg, norm_cfg=norm_cfg)
        options.update(mlp_ratio=self.arch['mlp_ratio'], with_cp=with_cp)
        self._build_stage1()
        self._build_stages(self._block_options(drop_path_rate, attn_cfg, options))
        self._freeze_stages()

    def _block_options(
        self, drop_path_rate: float, attn_cfg: dict | Sequence[dict], common: dict
    ) -> Iterator[dict]:
        """Options of the blocks, from first to last; parallel blocks share theirs."""
        attn_cfgs = attn_cfg if isinstance(attn_cfg, (list, tuple)) else [attn_cfg]
        if not attn_cfgs:
            raise ValueError(f'attn_cfg={attn_cfg!r}: expected one or more configs of attention')
        depth = sum(self.arch['num_modules']) * self.arch['num_blocks']
        rates = torch.linspace(0, drop_path_rate, depth, device='cpu').tolist()
        for rate, cfg in zip(rates, cycle(attn_cfgs)):
            yield dict(common, drop_path_rate=rate, attn_cfg=cfg)

    def _build_stage1(self) -> None:
        """Build the stem, which reduces images to 1/4 of their size, and two bottlenecks."""
        width, norm_cfg = STEM_CHANNELS, self.norm_cfg
        self.conv1, self.bn1, _ = conv_norm_relu(self.in_channels, width, 2, norm_cfg)
        self.conv2, self.bn2, _ = conv_norm_relu(width, width, 2, norm_cfg)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = Sequential(
            Bottleneck(width, width, norm_cfg=norm_cfg),
            Bottleneck(STAGE1_CHANNELS, width, norm_cfg=norm_cfg),
        )

    def _build_stages(self, blocks: Iterator[dict]) -> None:
        """Build stages 2 to 4; the transition before each adds a stream."""
        channels = self.arch['channels']
        self.transition1 = self._transition((STAGE1_CHANNELS,), channels[:2])
        self.stage2 = self._stage(2, blocks)
        self.transition2 = self._transition(channels[:2], channels[:3])
        self.stage3 = self._stage(3, blocks)
        self.transition3 = self._transition(channels[:3], channels)
        self.stage4 = self._stage(4, blocks)

    def _transition(self, before: Sequence[int], after: Sequence[int]) -> ModuleList:
        """Add a stream of half the size; the others pass through unless their channels change."""
        layers = [
            nn.Identity() if old == new else Sequential(*conv_norm_relu(old, new, 1, self.norm_cfg))
            for old, new in zip(before, after)
        ]
        added = Sequential(*conv_norm_relu(before[-1], after[-1], 2, self.norm_cfg))
        return ModuleList([*layers, Sequential(added)])

    def _stage(self, num_streams: int, blocks: Iterator[dict]) -> Sequential:
        """Build the modules of a stage, which take the options of their blocks in turn."""
        channels = self.arch['channels'][:num_streams]
        streams = list(zip(channels, self.arch['num_heads'], self.window_sizes))
        out_streams = [range(num_streams)] * self.arch['num_modules'][num_streams - 2]
        if num_streams == checks.NUM_STREAMS:
            out_streams[-1] = self.out_indices
        modules = []
        for outs in out_streams:
            options = list(islice(blocks, self.arch['num_blocks']))
            branches = [
                Sequential(*(HRFormerBlock(*stream, **block) for block in options))
                for stream in streams
            ]
            modules.append(HRModule(branches, channels, outs, self.upsample, self.norm_cfg))
        return Sequential(*modules)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature streams of a batch of images.

        Args:
            x (Tensor): Images of shape (B, in_channels, H, W), H and W at least 32 pixels.

        Returns:
            tuple[Tensor, ...]: For each i of ``out_indices`` the stream of shape
            (B, channels[i], ceil(H / 2**(i + 2)), ceil(W / 2**(i + 2))), in the memory format that
            convolutions give for these images and weights.

        Raises:
            TypeError: If the input is not a tensor or does not match the data type of the weights.
            ValueError: If the input has the wrong shape or is too small.
        """
        checks.check_images(x, self.in_channels, self.parameters())
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.layer1(x)  # (B, 256, H / 4, W / 4)
        xs, is_contiguous = [x], x.is_contiguous()
        for transition, stage in (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        ):
            # The new stream starts from the coarsest one.
            xs = stage([layer(x) for layer, x in zip(transition, [*xs, xs[-1]])])
        # The blocks work in channels-last.
        return tuple(xs[i].contiguous() if is_contiguous else xs[i] for i in self.out_indices)

    def _freeze_stages(self) -> None:
        stages = (
            (self.conv1, self.bn1, self.conv2, self.bn2),
            (self.layer1, self.transition1),
            (self.stage2, self.transition2),
            (self.stage3, self.transition3),
            (self.stage4,),
        )
        for module in chain(*stages[: self.frozen_stages + 1]):
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> HRFormer:
        """Set the mode; frozen stages, and with ``norm_eval`` all batch norms, stay in eval."""
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

        The stem, layer1 and transition1 are layer 0; after that, each block is one layer, with the
        parallel streams side by side. A transition belongs to the first block after it, an exchange
        to the last block before it, and everything else, such as heads and added modules, to the
        last layer.

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
        parts = plain_name(param_name[len(prefix) :]).split('.')
        if parts[0] in LAYER_0:
            return 0, num_layers
        if parts[0] in ('transition2', 'transition3'):
            stage, block = int(parts[0][-1]) + 1, 0
        elif parts[0].startswith('stage'):
            stage = int(parts[0][-1])
            # stage3.<module>.branches.<stream>.<block>... or stage3.<module>.fuse_layers...
            in_module = int(parts[4]) if parts[2] == 'branches' else num_blocks - 1
            block = int(parts[1]) * num_blocks + in_module
        else:
            return num_layers - 1, num_layers
        blocks_before = sum(self.arch['num_modules'][: stage - 2]) * num_blocks
        return 1 + blocks_before + block, num_layers

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # All ways of loading a checkpoint end here, so all formats work everywhere.
        adapt_backbone_keys(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args)

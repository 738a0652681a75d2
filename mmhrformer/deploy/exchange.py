"""The exchange between streams for exported files, in the memory layouts of runtimes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..models.hr_module import HRModule
from ..ops.recompute import is_plain
from .aligned_conv import MULTIPLE, pad_channels
from .fuse import append_zeros, is_paddable


class ChannelsLastModule(nn.Module):
    """:class:`HRModule` that adds the streams to channels-last maps, as its blocks take them.

    The contributions of the other streams are summed first, in the blocked layout in which
    onnxruntime convolves and enlarges; one reordering makes the sum channels-last. Channels are
    padded to a multiple of 4, without which onnxruntime does not use this layout: 78 of HRFormer-B
    become 80. In onnxruntime 1.31 on one core at 256x192, HRFormer-S is 1.02 to 1.04 and B at most
    1.02 times as fast.

    Args:
        module (HRModule): The module, which :meth:`fits`. Its convolutions are padded in place.
    """

    def __init__(self, module: HRModule) -> None:
        super().__init__()
        self.module = module
        for i in module.out_streams:
            for layer in module.fuse_layers[i]:
                pad_convs([conv for conv in layer.modules() if isinstance(conv, nn.Conv2d)])

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module can be replaced: its normalizations are folded."""
        return (
            type(module) is HRModule
            and is_plain(module, HRModule)
            and len(module.branches) > 1
            and all(map(is_paddable, module.fuse_layers))
        )

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor | None]:
        """Transform and exchange streams (B, C_i, H_i, W_i), like :meth:`HRModule.forward`."""
        module = self.module
        maps = [
            branch(x.permute(0, 2, 3, 1).contiguous()) for branch, x in zip(module.branches, xs)
        ]  # (B, H_i, W_i, C_i)
        sources = [pad_channels(x).permute(0, 3, 1, 2) for x in maps]
        return [
            self._exchange(maps[i], sources, i) if i in module.out_streams else None
            for i in range(len(xs))
        ]

    def _exchange(self, own: Tensor, sources: Sequence[Tensor], i: int) -> Tensor:
        """Sum the map (B, H_i, W_i, C_i) of stream i and the contributions of the others."""
        module, total = self.module, None
        for j, x in enumerate(sources):
            if j == i:
                continue
            x = module.fuse_layers[i][j](x)
            if j > i:
                x = module.enlarge(x, 2 ** (j - i), own.shape[1:3])
            total = x if total is None else total + x
        return module.relu(total.permute(0, 2, 3, 1) + own).permute(0, 3, 1, 2)


def pad_convs(convs: Sequence[nn.Conv2d]) -> None:
    """Extend the convolutions of an exchange layer for a padded map, except for its output."""
    for conv in convs:
        outputs = 0 if conv is convs[-1] else -conv.out_channels % MULTIPLE
        append_zeros(conv, -conv.in_channels % MULTIPLE, outputs)


def use_channels_last(model: nn.Module) -> nn.Module:
    """Replace the modules of a backbone by :class:`ChannelsLastModule` where they fit, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if ChannelsLastModule.fits(child):
                setattr(module, name, ChannelsLastModule(child))
    return model

"""Compilation of the blocks, in a fraction of the time that a whole model takes."""

from __future__ import annotations

from mmengine.utils import digit_version
from mmengine.utils.dl_utils import TORCH_VERSION
from torch import nn

from .fuse import BLOCKS

# The first torch that, according to its documentation, compiles modules that differ only in their
# weights only once. Tested with 2.13.
FIRST_TORCH = '2.5'
# Compiled versions of a function: streams times image sizes times training and evaluation. By
# default, torch falls back to eager mode after 8.
MAX_VERSIONS = 64


def compile_blocks(model: nn.Module, **options) -> nn.Module:
    """Compile the attention and the FFN of every HRFormer block.

    Blocks of a stream differ only in their weights, so the four streams need eight graphs,
    regardless of the model's depth. ``torch.compile(model)``, in contrast, makes one graph of all
    operators.

    Args:
        model (nn.Module): A classifier, pose estimator or segmentor with an HRFormer backbone, or
            a bare :class:`HRFormer`, folded or not. It is changed in place; its weights and
            checkpoints do not change. Copies of it are not compiled.
        **options: Arguments of ``torch.compile``. ``dynamic`` defaults to False: each image size
            is compiled separately.

    Returns:
        nn.Module: The model.

    Raises:
        RuntimeError: If torch is older than 2.5.
        ValueError: If the model has no :class:`HRFormerBlock`.

    Examples:
        >>> from mmhrformer import HRFormer
        >>> model = compile_blocks(HRFormer(arch='tiny'))  # doctest: +SKIP
    """
    if digit_version(TORCH_VERSION) < digit_version(FIRST_TORCH):
        raise RuntimeError(
            f'compile_blocks needs torch {FIRST_TORCH} or newer, but this is {TORCH_VERSION}, '
            'which would compile each block separately: call torch.compile(model) instead'
        )
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    if not blocks:
        raise ValueError(
            f'model={type(model).__name__} has no HRFormerBlock: call torch.compile(model)'
        )
    allow_many_versions()
    for block in blocks:
        for part in (block.attn, block.ffn):
            part.compile(**{'dynamic': False, **options})
    return model


def allow_many_versions(versions: int = MAX_VERSIONS) -> None:
    """Raise torch's limit of compiled versions per function, after which it runs eagerly.

    Args:
        versions (int): Number of versions. Defaults to 64.
    """
    from torch import _dynamo  # not at the top, since this import takes a second

    for name in ('cache_size_limit', 'accumulated_cache_size_limit'):
        if hasattr(_dynamo.config, name):
            setattr(_dynamo.config, name, max(getattr(_dynamo.config, name), versions))

"""Blocks compiled part by part, in a small part of the time that a whole model takes."""

from __future__ import annotations

from mmengine.utils import digit_version
from mmengine.utils.dl_utils import TORCH_VERSION
from torch import nn

from .fuse import BLOCKS

# The first torch to compile code once for all modules that differ in nothing but their weights, by
# its documentation; 2.13 is the one that was tried.
FIRST_TORCH = '2.5'
# Versions of one piece of code: streams times sizes of images times training and evaluation.
# torch would stop at 8 and go on uncompiled.
MAX_VERSIONS = 64


def compile_blocks(model: nn.Module, **options) -> nn.Module:
    """Compile the attention and the FFN of every HRFormer block.

    Blocks of a stream differ in nothing but their weights, so that the four streams need eight
    graphs, however deep the model is. ``torch.compile(model)`` makes one graph of all operators.

    Args:
        model (nn.Module): A classifier, pose estimator or segmentor with an HRFormer backbone, or
            a bare :class:`HRFormer`, folded or not. It is changed in place; its weights, and
            checkpoints of it, stay what they are. Copies of it are not compiled.
        **options: Arguments of ``torch.compile``. ``dynamic`` defaults to False: each size of
            images gets code of its own.

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
            f'compile_blocks needs torch {FIRST_TORCH} or newer, and this is {TORCH_VERSION}, '
            'which would compile each block anew: call torch.compile(model), or leave it uncompiled'
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
    """Let torch compile a piece of code more often than it would before it goes on uncompiled.

    Args:
        versions (int): Number of versions. Defaults to 64.
    """
    from torch import _dynamo  # takes a second that not everybody needs to spend

    for name in ('cache_size_limit', 'accumulated_cache_size_limit'):
        if hasattr(_dynamo.config, name):
            setattr(_dynamo.config, name, max(getattr(_dynamo.config, name), versions))

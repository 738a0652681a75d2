"""A hook to compile the blocks in the stock tools."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..deploy.compile import compile_blocks
from ..registry import HOOKS


@HOOKS.register_module()
class CompileBlocksHook(Hook):
    """Compile the blocks of the model before training, validation or testing begins.

    ``compile=True`` in a config compiles the whole training step. This hook compiles only the
    blocks, by :func:`mmhrformer.compile_blocks`, in a fraction of the time.

    Args:
        **options: Arguments of ``torch.compile``.

    Examples:
        >>> custom_hooks = [dict(type='mmhrformer.CompileBlocksHook')]
    """

    def __init__(self, **options) -> None:
        self.options = options

    def before_run(self, runner: Runner) -> None:
        """Compile the blocks.

        Args:
            runner (Runner): The runner.
        """
        compile_blocks(runner.model, **self.options)
        runner.logger.info('Blocks are compiled in the first iterations, which take minutes.')

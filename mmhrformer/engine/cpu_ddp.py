"""Training with multiple processes on CPUs, by the stock tools with ``--launcher pytorch``.

mmengine's launcher selects a CUDA device before it starts a process group, even for gloo, and
wraps the model for that device; both fail on a machine without one. This module works around both.
The options that a run on CPUs needs::

    torchrun --nproc_per_node 2 tools/train.py CONFIG --launcher pytorch --cfg-options
        env_cfg.dist_cfg.backend=gloo env_cfg.dist_cfg.timeout=300
        model_wrapper_cfg.type=mmhrformer.CPUDistributedDataParallel

Our ``tools/train.py`` and ``tools/test.py`` call :func:`prepare_cpu_launch`. Stock scripts do not,
and must be started with LOCAL_RANK=-1::

    torchrun --nproc_per_node 2 --no-python env LOCAL_RANK=-1 python STOCK/train.py CONFIG ...

``timeout`` is the time in seconds that a process waits for an unresponsive one, 1800 by default.
If a process dies, the others fail at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from torch import nn

from ..registry import MODEL_WRAPPERS

NO_DEVICE = '-1'  # torch.cuda.set_device ignores negative devices


def prepare_cpu_launch(args: Sequence[str]) -> bool:
    """Keep mmengine's ``--launcher pytorch`` from using CUDA on a machine without a device.

    The launcher calls ``torch.cuda.set_device(LOCAL_RANK)``, which is documented to be a no-op for
    a negative number. So LOCAL_RANK is set to -1, in this process only; mmengine still sets up the
    process group, by ``env_cfg.dist_cfg`` of the config. This applies only if a launcher started
    the process (RANK, LOCAL_RANK and WORLD_SIZE are set), the command line has
    ``--launcher pytorch``, and there is no accelerator: then the run would certainly fail.

    Args:
        args (Sequence[str]): Command line without the script.

    Returns:
        bool: Whether LOCAL_RANK has been changed.
    """
    words = ' '.join(args).replace('=', ' ').split()
    asked = ('--launcher', 'pytorch') in pairwise(words)
    launched = {'RANK', 'LOCAL_RANK', 'WORLD_SIZE'} <= set(os.environ)
    if not (asked and launched and get_device() == 'cpu'):
        return False
    if os.environ['LOCAL_RANK'] == NO_DEVICE:
        return False
    os.environ['LOCAL_RANK'] = NO_DEVICE
    if os.environ['RANK'] == '0':
        print_log(
            f'mmhrformer: no GPU was found, so LOCAL_RANK is set to {NO_DEVICE} to keep mmengine '
            'from using CUDA. Multiple processes on CPUs also need --cfg-options '
            'env_cfg.dist_cfg.backend=gloo '
            f'model_wrapper_cfg.type=mmhrformer.{CPUDistributedDataParallel.__name__}'
        )
    return True


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper for distributed data parallel training, on CPUs.

    It ignores the CUDA device that mmengine passes, and converts synchronized batch normalization,
    which torch supports only on GPUs, to the plain one, as mmengine does for a single process. Each
    process then normalizes with the statistics of its own images.

    Args:
        module (nn.Module): The model, on the CPU.
        device_ids (Sequence[int], optional): Not used; mmengine passes it to every wrapper.
        broadcast_buffers (bool): Whether the running statistics of the first process are copied to
            the others before each step. Defaults to False, as in mmengine on GPUs.
        **kwargs: Further options of torch's ``DistributedDataParallel``.

    Raises:
        ValueError: If the model is not on the CPU.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[int] | None = None,
        broadcast_buffers: bool = False,
        **kwargs,
    ) -> None:
        devices = {parameter.device.type for parameter in module.parameters()}
        if devices - {'cpu'}:
            raise ValueError(
                f'module: its parameters are on {sorted(devices)}, but {type(self).__name__} is '
                'for CPUs: do not set model_wrapper_cfg.type on machines with GPUs'
            )
        module = revert_sync_batchnorm(module)
        super().__init__(module, broadcast_buffers=broadcast_buffers, **kwargs)

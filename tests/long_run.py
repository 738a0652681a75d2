"""Train for long in one process and see whether memory grows or iterations become slower.

    OMP_NUM_THREADS=1 python tests/long_run.py --iterations 2000

trains the smallest config, HRFormer on digits, with its own optimizer on random images, and
compares the last quarter of the iterations with the first. It ends with status 1 if the resident
memory or the autograd graph has grown, if tensors or autograd functions have been left over, or if
the iterations have become slower.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import Tensor

from mmhrformer.configs import find_config

CONFIG = 'hrformer-demo_1xb64-6e_digits'
WARM_UP = 10  # iterations until the allocator and the optimizer have what they need
SAMPLES = 40  # how often objects are counted, which takes longer than an iteration
MAX_GROWTH = 1.05  # of the resident memory
MAX_SLOWDOWN = 1.5  # wide, since other work on the machine takes cache and clock


def resident_memory() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 1e6


def count_objects() -> int:
    """Number of living tensors and contexts of autograd functions."""
    kinds = (Tensor, torch.autograd.function.FunctionCtx)
    return sum(issubclass(type(thing), kinds) for thing in gc.get_objects())


def graph_size(loss: Tensor) -> int:
    """Number of autograd functions that a loss depends on."""
    found, todo = set(), [loss.grad_fn]
    while todo:
        function = todo.pop()
        if function is not None and function not in found:
            found.add(function)
            todo += [before for before, _ in function.next_functions]
    return len(found)


@dataclass
class Figures:
    """The measurements.

    Args:
        seconds (list[float]): CPU time of each iteration; the clock would count other work, too.
        memory (list[float]): Resident memory after each iteration, in MB.
        objects (list[int]): Tensors and contexts between iterations, at some of them.
        graphs (list[int]): Size of the autograd graph, at some iterations.
    """

    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)

    @staticmethod
    def quarters(values: list) -> tuple[list, list]:
        """The first and the last quarter of the values."""
        length = len(values) // 4
        return values[:length], values[-length:]

    @property
    def slowdown(self) -> float:
        """Median CPU time of an iteration in the last quarter, in units of that in the first."""
        first, last = map(median, self.quarters(self.seconds))
        return last / first

    @property
    def growth(self) -> float:
        """Mean resident memory in the last quarter, in units of that in the first."""
        first, last = map(mean, self.quarters(self.memory))
        return last / first

    def complaints(self) -> list[str]:
        """Say what has grown.

        Returns:
            list[str]: A line for each quantity; none if all is well.
        """
        lines = []
        if self.growth > MAX_GROWTH:
            lines.append(f'the resident memory grew by a factor of {self.growth:.3f}')
        for what, values in (('objects', self.objects), ('nodes of the graph', self.graphs)):
            first, last = self.quarters(values)
            if max(last) > max(first):
                lines.append(f'the number of {what} grew from {max(first)} to {max(last)}')
        if self.slowdown > MAX_SLOWDOWN:
            lines.append(f'iterations became slower by a factor of {self.slowdown:.2f}')
        return lines

    def __str__(self) -> str:
        memory = ' -> '.join(f'{mean(part):.1f}' for part in self.quarters(self.memory))
        seconds = ' -> '.join(f'{1e3 * median(part):.1f}' for part in self.quarters(self.seconds))
        return (
            f'{len(self.seconds)} iterations, first -> last quarter\n'
            f'resident memory    {memory} MB (x {self.growth:.4f})\n'
            f'CPU time           {seconds} ms (x {self.slowdown:.3f})\n'
            f'living objects     {self.objects[0]} -> {self.objects[-1]} '
            f'({min(self.objects)} to {max(self.objects)})\n'
            f'nodes of the graph {self.graphs[0]} -> {self.graphs[-1]} '
            f'({min(self.graphs)} to {max(self.graphs)})'
        )


def measure(losses: Iterator[Tensor], update: Callable[[Tensor], object], count: int) -> Figures:
    """Train and measure.

    Args:
        losses (Iterator[Tensor]): Computes the next loss when asked for it.
        update (Callable): Steps down the gradient of a loss.
        count (int): Number of iterations, not counting those for warming up.

    Returns:
        Figures: What was measured.
    """
    figures = Figures()
    interval = max(1, count // SAMPLES)
    for i in range(-WARM_UP, count):
        start = time.process_time()
        loss = next(losses)
        seconds = time.process_time() - start
        sampled = i >= 0 and i % interval == 0
        if sampled:
            figures.graphs.append(graph_size(loss))
        start = time.process_time()
        update(loss)
        seconds += time.process_time() - start
        del loss
        if i >= 0:
            figures.seconds.append(seconds)
            figures.memory.append(resident_memory())
        if sampled:
            figures.objects.append(count_objects())
    return figures


def train(count: int, batch_size: int, arch: dict | None = None) -> Figures:
    """Train the smallest config on random images and measure.

    Args:
        count (int): Number of iterations, not counting those for warming up.
        batch_size (int): Images a step.
        arch (dict, optional): Another architecture of the backbone.

    Returns:
        Figures: What was measured.
    """
    from mmpretrain.registry import MODELS
    from mmpretrain.structures import DataSample
    from mmpretrain.utils import register_all_modules

    register_all_modules()
    cfg = Config.fromfile(find_config(CONFIG))
    cfg.model.data_preprocessor = dict(type='ClsDataPreprocessor', **cfg.data_preprocessor)
    if arch:
        cfg.model.backbone.arch = arch
        cfg.model.neck[0].in_channels = arch['channels']
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)

    def losses() -> Iterator[Tensor]:
        while True:
            labels = torch.randint(10, (batch_size,)).tolist()
            data = dict(
                inputs=torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8),
                data_samples=[DataSample().set_gt_label(label) for label in labels],
            )
            data = model.data_preprocessor(data, training=True)
            yield model.parse_losses(model(**data, mode='loss'))[0]

    return measure(losses(), optimizer.update_params, count)


def main() -> None:
    """Read the command line, train, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--iterations', type=int, default=2000)
    parser.add_argument('--batch-size', type=int, default=4)
    args = parser.parse_args()
    figures = train(args.iterations, args.batch_size)
    print(figures)
    sys.exit('; '.join(figures.complaints()) or None)


if __name__ == '__main__':
    main()

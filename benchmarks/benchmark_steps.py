"""What ``tools/benchmark.py`` measures: steps of the candidates, checked to compute the same."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from benchmark_measure import saved_bytes
from benchmark_peers import (
    SAME_WEIGHTS,
    BenchmarkError,
    Network,
    Spec,
    build_network,
    make_weights,
    model_config,
    parse_spec,
)
from torch import Tensor

from mmhrformer.checkpoints import convert

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
# Largest difference of an output, relative to the range of the expected output. Below float32 it
# is rounding, which grows over 100 layers; the limit there finds wrong code, not rounding.
OUTPUT_LIMITS = {'fp32': 1e-4, 'bf16': 0.1, 'fp16': 0.02}
# Norm of the difference of all gradients, relative to their norm. ReLU and batch normalization
# over few values magnify rounding.
GRADIENT_LIMIT = 0.01
# What others with the same weights must equal.
PLAIN = 'ours-nchw'


@dataclass(frozen=True)
class Case:
    """What all candidates are measured on.

    Attributes:
        size (tuple[int, int]): Height and width of the images.
        batch (int): Images in a batch.
        window (int, optional): Side of HRFormer's windows, if not the config's.
    """

    size: tuple[int, int]
    batch: int
    window: int | None = None

    @property
    def pixels(self) -> int:
        """Pixels of the whole batch."""
        return self.batch * self.size[0] * self.size[1]

    def __str__(self) -> str:
        window = f' w{self.window}' if self.window else ''
        return f'{self.size[0]}x{self.size[1]} b{self.batch}{window}'


class Entrant:
    """A candidate that is ready to run.

    Args:
        spec (Spec): The candidate.
        network (Network): Its network.
        args (argparse.Namespace): The arguments.
    """

    def __init__(self, spec: Spec, network: Network, args: argparse.Namespace) -> None:
        self.spec = spec
        self.args = args
        channels_last = spec.has('nhwc') or (args.channels_last and not spec.has('nchw'))
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(args.device, memory_format=self.layout)
        self.network.train(args.mode == 'train')
        self.precision = 'fp32'
        self.prepare('fp32')

    def prepare(self, precision: str) -> None:
        """Get ready for a data type, a key of :data:`DTYPES`; compiles anew."""
        if precision != self.precision and not self.args.autocast:
            self.network.to(DTYPES[precision])
        self.precision = precision
        self.call = self.network
        self.optimizer = self.scaler = None
        if self.spec.has('compiled'):
            # Each size its own code, as in a deployment; torch would go over to dynamic sizes.
            self.call = torch.compile(self.network, mode=self.args.compile_mode, dynamic=False)

    def images(self, case: Case) -> Tensor:
        """Random images, equal for all candidates."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(case.batch, 3, *case.size, generator=generator)
        dtype = torch.float32 if self.args.autocast else DTYPES[self.precision]
        return images.to(self.args.device, dtype).contiguous(memory_format=self.layout)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the network, with autocast if that was asked for."""
        graphs = self.spec.has('compiled') and self.args.compile_mode != 'default'
        if graphs and hasattr(torch.compiler, 'cudagraph_mark_step_begin'):
            # The results of other models in CUDA graphs need not be kept any more.
            torch.compiler.cudagraph_mark_step_begin()
        if self.args.autocast and self.precision != 'fp32':
            with torch.autocast(self.args.device, DTYPES[self.precision]):
                return self.call(images)
        return self.call(images)

    def make_optimizer(self) -> None:
        """AdamW with two groups, the same for every candidate; a scaler for fp16."""
        parameters = list(self.network.parameters())
        groups = [
            dict(params=[p for p in parameters if p.ndim > 1]),
            dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0),
        ]
        # The rate is small: it costs the same, and losses stay finite however long it runs.
        options = dict(lr=1e-6, weight_decay=0.01)
        if self.args.device == 'cuda':
            options['fused'] = True
        self.optimizer = torch.optim.AdamW(groups, **options)
        if self.precision == 'fp16':
            self.scaler = torch.cuda.amp.GradScaler()


class InferenceStep:
    """A forward pass without gradients."""

    def __init__(self, entrant: Entrant, case: Case) -> None:
        self.entrant = entrant
        self.images = entrant.images(case)
        self.graph = None
        if entrant.spec.has('cudagraph'):
            self.capture()

    def run(self) -> tuple[Tensor, ...]:
        """The forward pass."""
        with torch.inference_mode():
            return self.entrant.forward(self.images)

    def capture(self) -> None:
        """Record the kernels of a forward pass, to launch them all at once."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outs = self.run()

    def __call__(self) -> tuple[Tensor, ...]:
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.outs


class TrainingStep:
    """Forward, mean-square loss against fixed targets, backward, optimizer."""

    def __init__(self, entrant: Entrant, case: Case) -> None:
        self.entrant = entrant
        self.images = entrant.images(case)
        self.targets = None

    def forward(self) -> tuple[Tensor, ...]:
        """The forward pass."""
        return self.entrant.forward(self.images)

    def backward(self) -> tuple[Tensor, ...]:
        """Forward, loss and backward; the outputs."""
        outs = self.forward()
        if self.targets is None:
            generator = torch.Generator().manual_seed(1)
            targets = (torch.randn(out.shape, generator=generator) for out in outs)
            self.targets = [target.to(out.device) for target, out in zip(targets, outs)]
        loss = sum(F.mse_loss(out.float(), target) for out, target in zip(outs, self.targets))
        scaler = self.entrant.scaler
        (scaler.scale(loss) if scaler else loss).backward()
        return outs

    def __call__(self) -> None:
        entrant = self.entrant
        if entrant.optimizer is None:
            entrant.make_optimizer()
        entrant.optimizer.zero_grad(set_to_none=True)
        self.backward()
        if entrant.scaler:
            entrant.scaler.step(entrant.optimizer)
            entrant.scaler.update()
        else:
            entrant.optimizer.step()

    def saved_bytes(self) -> int:
        """Bytes that the forward pass keeps for the backward pass, weights not counted."""
        network = self.entrant.network
        return saved_bytes(self.forward, [*network.parameters(), *network.buffers()])


Step = InferenceStep | TrainingStep


def make_step(entrant: Entrant, case: Case) -> Step:
    """What is measured of a candidate in a case."""
    kind = TrainingStep if entrant.args.mode == 'train' else InferenceStep
    return kind(entrant, case)


Entrants = dict[tuple[str, int | None], Entrant]


def build_entrants(args: argparse.Namespace, specs: list[Spec], drop: bool) -> Entrants:
    """Build candidates, those that claim to be equal with the same weights.

    Args:
        args (argparse.Namespace): The arguments.
        specs (list[Spec]): The candidates.
        drop (bool): Whether to keep stochastic depth and dropout.

    Returns:
        Entrants: The candidates by name and window.
    """
    entrants = {}
    with torch.random.fork_rng(devices=[]):
        for window in args.window:
            weights = make_weights(args.task, args.arch, window)
            for spec in specs:
                cfg = model_config(spec, args.task, args.arch, args.size[0], window, drop)
                network = build_network(spec, cfg, weights, drop)
                entrants[spec.name, window] = Entrant(spec, network, args)
    return entrants


# ---------------------------------------------------------------- are they equal?


@contextmanager
def exact_products() -> Iterator[None]:
    """Keep CUDA from rounding the factors of float32 products (TF32)."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


def evaluate(entrant: Entrant, case: Case) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of a step, and in training its gradients by our names."""
    step = make_step(entrant, case)
    if entrant.args.mode == 'infer':
        return [out.float() for out in step()], {}
    entrant.network.zero_grad(set_to_none=True)
    outs = [out.detach().float() for out in step.backward()]
    named = entrant.network.named_parameters()
    grads = {name: p.grad.float() for name, p in named if p.grad is not None}
    entrant.network.zero_grad(set_to_none=True)
    backbone = {name: grads.pop(name) for name in list(grads) if name.startswith('backbone.')}
    return outs, {**grads, **convert(backbone)[0]}


def output_difference(outs: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of an output, relative to the range of what is expected.

    Args:
        outs (list[Tensor]): The outputs.
        expected (list[Tensor]): What they should be.

    Returns:
        float: The difference; infinite if shapes differ, and not a number if an output is not.
    """
    if [out.shape for out in outs] != [out.shape for out in expected]:
        return math.inf
    ratios = [(a - b).abs().max() / (b.max() - b.min()) for a, b in zip(outs, expected)]
    return torch.stack(ratios).max().item()


def gradient_difference(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, relative to their norm.

    Args:
        grads (dict[str, Tensor]): The gradients by name.
        expected (dict[str, Tensor]): What they should be.

    Returns:
        float: The difference; infinite if the names differ.
    """
    if set(grads) != set(expected):
        return math.inf
    error = sum((grads[name] - grad).square().sum() for name, grad in expected.items())
    return (error / sum(grad.square().sum() for grad in expected.values())).sqrt().item()


def compare(entrant: Entrant, case: Case, outs: list[Tensor], grads: dict[str, Tensor]) -> dict:
    """Compare a candidate with what is expected of it, and print what is found.

    Args:
        entrant (Entrant): The candidate.
        case (Case): The case.
        outs (list[Tensor]): The outputs that are expected.
        grads (dict[str, Tensor]): The gradients that are expected; none for inference.

    Returns:
        dict: What was found.
    """
    name, precision = entrant.spec.name, entrant.precision
    limit = OUTPUT_LIMITS[precision]
    its_outs, its_grads = evaluate(entrant, case)
    row = dict(candidate=name, case=str(case), dtype=precision, limit=limit)
    row['outputs'] = output_difference(its_outs, outs)
    row['equal'] = row['outputs'] <= limit
    text = f'outputs differ by {row["outputs"]:.1e} of their range (limit {limit:.0e})'
    if grads:
        row['gradients'] = gradient_difference(its_grads, grads)
        text += f', gradients by {row["gradients"]:.1e} of their norm'
    if grads and precision == 'fp32':  # of low precision nothing can be expected here
        row['equal'] &= row['gradients'] <= GRADIENT_LIMIT
        text += f' (limit {GRADIENT_LIMIT:.0e})'
    verdict = 'equal' if row['equal'] else 'DIFFERENT'
    print(f'{verdict:<9} {name}, {case}, {precision}: {text}', flush=True)
    return row


def check_equality(
    args: argparse.Namespace, entrants: Entrants, references: Entrants
) -> list[dict]:
    """Compare the candidates that have the same weights with ours, run plainly in float32.

    Args:
        args (argparse.Namespace): The arguments.
        entrants (Entrants): The candidates, without stochastic depth and dropout.
        references (Entrants): The same for ours alone.

    Returns:
        list[dict]: What was found of each candidate in each case.
    """
    found = []
    same = [spec.name for spec in args.specs if spec.base in SAME_WEIGHTS]
    for case in args.cases if same else ():
        expected = evaluate(references[PLAIN, case.window], case)
        found += [compare(entrants[name, case.window], case, *expected) for name in same]
    return found


def prepare_entrants(args: argparse.Namespace) -> tuple[Entrants, list[dict]]:
    """Build the candidates and check that those with the same weights compute the same.

    Args:
        args (argparse.Namespace): The arguments.

    Returns:
        tuple[Entrants, list[dict]]: The candidates, ready to be timed, and what the check found.

    Raises:
        BenchmarkError: If they do not, unless that is allowed.
    """
    entrants = build_entrants(args, args.specs, drop=False)
    references = build_entrants(args, [parse_spec(PLAIN)], drop=False)
    with exact_products():
        found = check_equality(args, entrants, references)
        if args.dtype != 'fp32':
            switch_precision(entrants, args.dtype)
            found += check_equality(args, entrants, references)
    print()
    different = [f'{row["candidate"]} ({row["case"]})' for row in found if not row['equal']]
    if different and not args.allow_different:
        raise BenchmarkError(
            f'not timed, since these do not compute the same as ours: {", ".join(different)}. '
            '--allow-different times them all the same'
        )
    if args.mode == 'train' and not args.no_drop:
        # Stochastic depth may change what is built and compiled: so it all is, anew.
        entrants = build_entrants(args, args.specs, drop=True)
        switch_precision(entrants, args.dtype)
    return entrants, found


def switch_precision(entrants: Entrants, precision: str) -> None:
    """Bring candidates to a data type, and forget compiled code, which was for another."""
    if any(entrant.spec.has('compiled') for entrant in entrants.values()):
        torch.compiler.reset()
    for entrant in entrants.values():
        entrant.prepare(precision)

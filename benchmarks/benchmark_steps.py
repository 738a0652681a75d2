"""Steps of the candidates of ``tools/benchmark.py``, and the check that results are equal."""

from __future__ import annotations

import argparse
import io
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from benchmark_measure import saved_bytes
from benchmark_peers import SAME_WEIGHTS, BenchmarkError, Network, Spec, build_network, parse_spec
from torch import Tensor

from mmhrformer.checkpoints import convert
from mmhrformer.deploy.onnx import EXPORTER, INPUT, OPSETS, open_session, prepare_for_export

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
# Largest difference of an output, relative to the range of the expected output. Below float32,
# rounding errors grow over 100 layers; the limit is to find wrong code only.
OUTPUT_LIMITS = {'fp32': 1e-4, 'bf16': 0.1, 'fp16': 0.02}
# Norm of the difference of all gradients, relative to their norm. ReLU and batch normalization
# over few values amplify rounding errors.
GRADIENT_LIMIT = 0.01
# The reference for all candidates with the same weights.
PLAIN = parse_spec('ours-nchw')


class Case(NamedTuple):
    """Height and width of the images, batch size, and side of the windows if not the default."""

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
        args (argparse.Namespace): The arguments: ``mode``, ``device``, ``channels_last``, and
            ``compile_mode`` for compiled candidates.
    """

    def __init__(self, spec: Spec, network: Network, args: argparse.Namespace) -> None:
        self.spec = spec
        self.args = args
        channels_last = args.channels_last and not spec.has('nchw')
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.trains = args.mode == 'train'
        self.exported: dict[Case, Exported] = {}
        self.network = network.to(args.device, memory_format=self.layout).train(self.trains)
        self.prepare('fp32')

    def prepare(self, precision: str) -> None:
        """Prepare for a data type, a key of :data:`DTYPES`; recompiles."""
        self.precision, self.optimizer = precision, None
        # Inference casts the model, training uses autocast.
        self.autocast = self.trains and precision != 'fp32'
        if not self.trains:
            self.network.to(DTYPES[precision])
        self.call = self.network
        if self.spec.has('compiled'):
            # Compile each size separately, as in deployment, instead of dynamic sizes.
            self.call = torch.compile(self.network, mode=self.args.compile_mode, dynamic=False)

    def images(self, case: Case) -> Tensor:
        """Random images, the same for all candidates."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(case.batch, 3, *case.size, generator=generator)
        dtype = torch.float32 if self.trains else DTYPES[self.precision]
        return images.to(self.args.device, dtype).contiguous(memory_format=self.layout)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the network, in training with autocast below float32."""
        if self.spec.has('compiled') and self.args.compile_mode != 'default':
            # Allow CUDA graphs to overwrite the results of previous steps.
            torch.compiler.cudagraph_mark_step_begin()
        autocast = partial(torch.autocast, self.args.device, DTYPES[self.precision])
        with autocast() if self.autocast else nullcontext():
            return self.call(images)

    def make_optimizer(self) -> None:
        """AdamW with two groups, the same for every candidate."""
        parameters = list(self.network.parameters())
        groups = [
            dict(params=[p for p in parameters if p.ndim > 1]),
            dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0),
        ]
        # A small learning rate keeps losses finite in long runs.
        options = dict(fused=True) if self.args.device == 'cuda' else {}
        self.optimizer = torch.optim.AdamW(groups, lr=1e-6, weight_decay=0.01, **options)


class Replay:
    """A function captured in a CUDA graph; calling it replays the graph.

    The function is kept alive, and with it the weights and images whose addresses the graph uses.

    Args:
        run (Callable): The function, without arguments.
        pool (object, optional): Memory to share with graphs that never run at the same time.
    """

    def __init__(self, run: Callable, pool: object = None) -> None:
        self.run, self.graph = run, torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # warm-up
                run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph, pool=pool):
            self.result = run()

    def __call__(self) -> object:
        self.graph.replay()
        return self.result


class Exported:
    """A network exported for images of one size, as by :func:`export_onnx`, in a runtime."""

    def __init__(self, network: Network, images: Tensor, runtime: str) -> None:
        import onnx
        import onnxslim

        network, content = prepare_for_export(network, fixed_size=True), io.BytesIO()
        options = dict(opset_version=OPSETS[-1], input_names=[INPUT], **EXPORTER)
        options['dynamic_axes'] = {INPUT: {0: 'batch'}}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about constant sizes
            torch.onnx.export(network, (images,), content, **options)
        graph = onnxslim.slim(onnx.load_from_string(content.getvalue()))
        inputs = {INPUT: images.contiguous().numpy()}
        if runtime == 'openvino':
            model = open_in_openvino(graph.SerializeToString(), tuple(images.shape))
            self.run = lambda: [np.array(out) for out in model(inputs).values()]
        else:
            session = open_session(graph.SerializeToString())
            self.run = lambda: session.run(None, inputs)

    def __call__(self) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, self.run()))


def open_in_openvino(graph: bytes, shape: tuple[int, ...]):
    """Compile a graph in OpenVINO for the CPU, in float32, with as many threads as torch uses.

    Fixed for images of one shape: with a dynamic batch HRFormer-S takes 1.1 times as long.
    """
    import openvino

    options = dict(
        INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=str(torch.get_num_threads())
    )
    core = openvino.Core()
    model = core.read_model(io.BytesIO(graph))
    model.reshape(list(shape))
    return core.compile_model(model, 'CPU', options)


class InferenceStep:
    """A forward pass without gradients."""

    def __init__(self, entrant: Entrant, case: Case) -> None:
        self.entrant = entrant
        self.images = entrant.images(case)
        self.call = Replay(self.forward) if entrant.spec.has('cudagraph') else self.forward
        if runtime := entrant.spec.runtime:
            if case not in entrant.exported:
                entrant.exported[case] = Exported(entrant.network, self.images, runtime)
            self.call = entrant.exported[case]

    def forward(self) -> tuple[Tensor, ...]:
        """The forward pass."""
        with torch.inference_mode():
            return self.entrant.forward(self.images)

    def __call__(self) -> tuple[Tensor, ...]:
        return self.call()


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
        """Run forward pass, loss and backward pass; return the outputs."""
        outs = self.forward()
        if self.targets is None:
            generator = torch.Generator().manual_seed(1)
            targets = (torch.randn(out.shape, generator=generator) for out in outs)
            self.targets = [target.to(out.device) for target, out in zip(targets, outs)]
        sum(F.mse_loss(out.float(), target) for out, target in zip(outs, self.targets)).backward()
        return outs

    def __call__(self) -> None:
        if self.entrant.optimizer is None:
            self.entrant.make_optimizer()
        self.entrant.optimizer.zero_grad(set_to_none=True)
        self.backward()
        self.entrant.optimizer.step()

    def saved_bytes(self) -> int:
        """Bytes that the forward pass keeps for the backward pass, without weights."""
        network = self.entrant.network
        return saved_bytes(self.forward, [*network.parameters(), *network.buffers()])


Step = InferenceStep | TrainingStep


def make_step(entrant: Entrant, case: Case) -> Step:
    """The step of a candidate in a case."""
    return (TrainingStep if entrant.trains else InferenceStep)(entrant, case)


Entrants = dict[tuple[str, int | None], Entrant]


def build_entrants(args: argparse.Namespace, specs: list[Spec], drop: bool) -> Entrants:
    """Build candidates, by name and window; ``drop`` keeps stochastic depth and dropout."""
    with torch.random.fork_rng(devices=[]):
        return {
            (spec.name, window): Entrant(
                spec, build_network(spec, args.task, args.arch, args.size[0], window, drop), args
            )
            for window in args.window
            for spec in specs
        }


# ---------------------------------------------------------------- equality


def evaluate(entrant: Entrant, case: Case) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of a step, and in training its gradients by our names."""
    step = make_step(entrant, case)
    if not entrant.trains:
        return [out.float() for out in step()], {}
    entrant.network.zero_grad(set_to_none=True)
    outs = [out.detach().float() for out in step.backward()]
    named = entrant.network.named_parameters()
    grads = {name: p.grad.float() for name, p in named if p.grad is not None}
    entrant.network.zero_grad(set_to_none=True)
    backbone = {name: grads.pop(name) for name in list(grads) if name.startswith('backbone.')}
    return outs, {**grads, **convert(backbone)[0]}


def output_difference(outs: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of an output, relative to the range of the expected one.

    It is infinite if shapes differ, and NaN if an output has NaN.
    """
    if [out.shape for out in outs] != [out.shape for out in expected]:
        return math.inf
    ratios = [(a - b).abs().max() / (b.max() - b.min()) for a, b in zip(outs, expected)]
    return torch.stack(ratios).max().item()


def gradient_difference(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, relative to their norm; infinite if names differ."""
    if set(grads) != set(expected):
        return math.inf
    error = sum((grads[name] - grad).square().sum() for name, grad in expected.items())
    return (error / sum(grad.square().sum() for grad in expected.values())).sqrt().item()


def compare(entrant: Entrant, case: Case, outs: list[Tensor], grads: dict[str, Tensor]) -> dict:
    """Compare a candidate with the expected outputs and gradients, and print the result."""
    name, precision = entrant.spec.name, entrant.precision
    limit = OUTPUT_LIMITS[precision]
    its_outs, its_grads = evaluate(entrant, case)
    found = output_difference(its_outs, outs)
    row = dict(candidate=name, case=str(case), dtype=precision, limit=limit, outputs=found)
    row['equal'] = found <= limit
    text = f'outputs differ by {found:.1e} of their range (limit {limit:.0e})'
    if grads:
        row['gradients'] = gradient_difference(its_grads, grads)
        text += f', gradients by {row["gradients"]:.1e} of their norm'
    if grads and precision == 'fp32':  # not meaningful in low precision
        row['equal'] &= row['gradients'] <= GRADIENT_LIMIT
        text += f' (limit {GRADIENT_LIMIT:.0e})'
    verdict = 'equal' if row['equal'] else 'DIFFERENT'
    print(f'{verdict:<9} {name}, {case}, {precision}: {text}', flush=True)
    return row


def check_equality(
    args: argparse.Namespace, entrants: Entrants, references: Entrants
) -> list[dict]:
    """Compare candidates with the same weights with our plain model in float32."""
    found = []
    same = [spec.name for spec in args.specs if spec.base in SAME_WEIGHTS]
    for case in args.cases if same else ():
        expected = evaluate(references[PLAIN.name, case.window], case)
        found += [compare(entrants[name, case.window], case, *expected) for name in same]
    return found


def prepare_entrants(args: argparse.Namespace) -> tuple[Entrants, list[dict]]:
    """Build the candidates and check that those with the same weights give the same results.

    Args:
        args (argparse.Namespace): The arguments.

    Returns:
        tuple[Entrants, list[dict]]: The candidates, ready to be timed, and the results of the
        check: one row per candidate and case.

    Raises:
        BenchmarkError: If results differ, unless that is allowed.
    """
    # Stochastic depth and dropout would make the candidates differ.
    entrants = build_entrants(args, args.specs, drop=False)
    references = build_entrants(args, [PLAIN], drop=False)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = check_equality(args, entrants, references)
        if args.dtype != 'fp32':
            switch_precision(entrants, args.dtype)
            found += check_equality(args, entrants, references)
    print()
    different = [f'{row["candidate"]} ({row["case"]})' for row in found if not row['equal']]
    if different and not args.allow_different:
        raise BenchmarkError(
            f'not timed, since these give other results than ours: {", ".join(different)}. '
            '--allow-different times them anyway'
        )
    if args.mode == 'train' and not args.no_drop:
        # Stochastic depth may change the modules and the compiled code: build everything again.
        entrants = build_entrants(args, args.specs, drop=True)
        switch_precision(entrants, args.dtype)
    return entrants, found


def switch_precision(entrants: Entrants, precision: str) -> None:
    """Convert candidates to a data type, and reset compiled code."""
    if any(entrant.spec.has('compiled') for entrant in entrants.values()):
        torch.compiler.reset()
    for entrant in entrants.values():
        entrant.prepare(precision)

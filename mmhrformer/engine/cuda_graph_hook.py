"""Training of the backbone by CUDA graphs: two launches per step instead of thousands."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..ops.recompute import is_plain
from ..ops.state import autocast_dtype, is_compiling
from ..ops.triton_support import refuse_second_derivatives
from ..registry import HOOKS

WARM_UP = 3  # passes before the capture, in which libraries and Triton select their kernels
REMEDY = 'do not use CUDAGraphHook or graph_backbone'


class GraphCapture:
    """Capture of functions in CUDA graphs that share memory, and so must run in order."""

    def __init__(self, device: torch.device) -> None:
        if device.type != 'cuda':
            raise RuntimeError(
                f'the backbone is on device={str(device)!r}, but CUDA graphs need an NVIDIA GPU: '
                f'move the model to one, or {REMEDY}'
            )
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Run the body on the stream that is used for captures."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def capture(self, function: Callable[[], list[Tensor]]) -> tuple[Callable, list[Tensor]]:
        """Capture a function; return its replay function and the outputs that replays overwrite."""
        graph = torch.cuda.CUDAGraph()
        # Not 'global': threads that pin batches or monitor NCCL may call CUDA at the same time.
        with torch.cuda.graph(graph, self.pool, self.stream, 'thread_local'):
            static = function()
        return graph.replay, static


class Ticket:
    """State of one forward pass, alive as long as its autograd graph."""

    done = False  # whether its backward pass has run


class Replay(torch.autograd.Function):
    """Both graphs as one autograd node, whose inputs are the parameters.

    Autograd accumulates the gradients that ``backward`` returns into the parameters, where
    DistributedDataParallel waits for them. All arrive at once, so only the communication of the
    head's gradients overlaps with computation.
    """

    @staticmethod
    def forward(ctx, graphed: GraphedForward, images: Tensor, *parameters) -> tuple[Tensor, ...]:
        """Replay the forward pass on images (B, C, H, W)."""
        ctx.graphed, ctx.ticket = graphed, Ticket()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(parameters[0])  # so that autograd detects an optimizer step
        return graphed.replay_forward(ctx.ticket, images)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Replay the backward pass; the gradients of the parameters."""
        refuse_second_derivatives('graph_backbone', REMEDY)
        ctx.saved_tensors  # noqa: B018  (raises if it was modified in the meantime)
        return None, None, *ctx.graphed.replay_backward(ctx.ticket, grads)


class GraphedForward:
    """Replacement of ``module.forward``: replays graphs where they match, or calls the original.

    Args:
        module (nn.Module): The backbone, which returns a tuple of tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.ordinary = module, module.forward
        self.modules = list(module.modules())
        self.held = [m._parameters for m in self.modules if m._parameters]
        self.graphs = GraphCapture(next(module.parameters()).device)
        self.key, self.last, self.calls, self.replays = None, lambda: None, 0, 0

    def __reduce__(self) -> tuple:
        # Copies, such as EMAHook's, and pickles use the forward function of their class.
        return getattr, (self.module, 'forward')

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps of images (B, C, H, W)."""
        if is_compiling() or not torch.is_grad_enabled() or images.requires_grad:
            return self.ordinary(images)
        if self.key is None and self.module.training:
            self.capture(images)
        self.calls += self.module.training
        # Do not replay if that would overwrite what a pending backward pass needs.
        if not getattr(self.last(), 'done', True) or self.key != self._key(images):
            return self.ordinary(images)
        if not self._restore_buffers():
            return self.ordinary(images)
        self.replays += 1
        return Replay.apply(self, images, *self.parameters)

    def _key(self, images: Tensor) -> tuple:
        """Everything that a graph assumes; collecting it takes 0.3 ms for HRFormer-S."""
        held = [p for place in self.held for p in place.values() if p is not None]
        weights = [(p.data_ptr(), p.requires_grad) for p in held]
        modes = autocast_dtype(images.device.type), [m.training for m in self.modules]
        return images.shape, images.stride(), images.dtype, images.device, modes, weights

    def _restore_buffers(self) -> bool:
        """Put the buffers of the graphs back where others were assigned; return whether they fit.

        mmpretrain's PreciseBNHook assigns new running statistics, whose values are copied.
        """
        for held, name, buffer in self.buffers:
            now = held.get(name)
            if now is buffer:
                continue
            kinds = [(b.shape, b.dtype, b.device) for b in (buffer, now) if b is not None]
            if kinds != kinds[:1] * 2:
                return False
            buffer.copy_(now)
            held[name] = buffer
        return True

    def capture(self, images: Tensor) -> None:
        """Capture both passes for images like these, (B, C, H, W), in the current modes.

        Raises:
            RuntimeError: If the backbone does something that CUDA graphs do not support.
        """
        key = self._key(images)
        self.images, self.grads = images.clone(), None
        learned = [p for p in self.module.parameters() if p.requires_grad]
        self.halved = weights_of_products(self.module) if autocast_dtype(images.device.type) else []
        self.parameters = sorted(learned, key=lambda p: (str(p.dtype), p in set(self.halved)))
        places = [m._buffers for m in self.modules]
        self.buffers = [
            (held, *pair) for held in places for pair in held.items() if pair[1] is not None
        ]
        before = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        try:  # the warm-up must not change random states and statistics
            random = torch.random.fork_rng([images.device] if images.is_cuda else [])
            with random:
                with self.graphs.warm_up():
                    for _ in range(WARM_UP):
                        self._forward()
                        self._backward()
                self.run_forward, self.outputs = self.graphs.capture(self._forward)
                self.run_backward, self.flats = self.graphs.capture(self._backward)
        except RuntimeError as err:
            raise RuntimeError(
                f'the backbone, {type(self.module).__name__}, cannot be captured in CUDA graphs: '
                f'{err}; {REMEDY}'
            ) from err
        finally:
            for buffer, values in before:
                buffer.copy_(values)
        self.key = key

    @contextmanager
    def _aliases(self) -> Iterator[None]:
        """Replace the parameters by separate autograd leaves that share their memory.

        The parameters may already have autograd nodes on the main stream, as those that
        DistributedDataParallel creates: a captured backward pass must not wait for that stream.
        """
        own = [dict(held) for held in self.held]
        for held in self.held:
            held.update({name: self.leaves.get(p) for name, p in held.items()})
        try:
            yield
        finally:
            for held, before in zip(self.held, own):
                held.update(before)

    def _forward(self) -> list[Tensor]:
        """The forward pass on ``self.images``."""
        dtype = autocast_dtype(self.images.device.type)
        data = {p: p.detach() for p in self.module.parameters()}
        # Cast all at once what autocast would cast one by one, and autograd again in the backward.
        halves = [torch.empty_like(data[p], dtype=dtype) for p in self.halved]
        if halves:
            torch._foreach_copy_(halves, [data[p] for p in self.halved])
        data.update(zip(self.halved, halves))
        self.leaves = {p: nn.Parameter(x, p.requires_grad) for p, x in data.items()}
        # Other weights are cast in each replay; autocast's cache would keep memory of the graphs.
        cast = torch.autocast(self.images.device.type, dtype, dtype is not None, False)
        with torch.enable_grad(), cast, self._aliases():
            outputs = self.ordinary(self.images)
        if not (isinstance(outputs, (tuple, list)) and all(o.requires_grad for o in outputs)):
            raise RuntimeError('it does not return a tuple of tensors that require gradients')
        self.live = list(outputs)
        if self.grads is None:
            self.grads = [torch.zeros_like(o) for o in outputs]
        return [o.detach() for o in outputs]

    def _backward(self) -> list[Tensor]:
        """The backward pass from ``self.grads``; gradients are flattened by data type."""
        leaves = [self.leaves[p] for p in self.parameters]
        with torch.autocast(self.images.device.type, enabled=False), self._aliases():
            grads = torch.autograd.grad(self.live, leaves, self.grads, allow_unused=True)
        del self.live
        used = [(p, g) for p, g in zip(self.parameters, grads) if g is not None]
        self.parameters, self.places, flats = [p for p, _ in used], [], []
        for (dtype, _), group in groupby(used, key=lambda pair: tuple(x.dtype for x in pair)):
            pieces, offset = [], 0
            for parameter, grad in group:
                stride = torch.empty_like(parameter, device='meta').stride()  # dense, same order
                alike = grad.is_contiguous() and parameter.is_contiguous()
                if not alike and grad.stride() != stride:
                    grad = grad.new_empty_strided(grad.shape, stride).copy_(grad)
                self.places.append((len(flats), (grad.shape, stride, offset)))
                pieces.append(grad.as_strided((grad.numel(),), (1,)))
                offset += grad.numel()
            flats.append(torch.cat(pieces).to(dtype))
        return flats

    def replay_forward(self, ticket: Ticket, images: Tensor) -> tuple[Tensor, ...]:
        """Run the forward pass; the feature maps are copies that later replays do not change."""
        self.images.copy_(images)
        self.run_forward()
        self.last = weakref.ref(ticket)
        return tuple(output.clone() for output in self.outputs)

    def replay_backward(self, ticket: Ticket, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Run the backward pass; return the gradients of the parameters.

        Raises:
            RuntimeError: If it has run already, or the loss does not depend on every output.
        """
        if ticket.done:
            raise RuntimeError(
                'a second backward pass through a backbone in CUDA graphs (retain_graph=True): the '
                f'first one has overwritten what it needs; sum the losses, or {REMEDY}'
            )
        if unused := [i for i, grad in enumerate(grads) if grad is None]:
            raise RuntimeError(
                f'the loss does not depend on outputs {unused} of the backbone, but CUDA graphs '
                'need gradients for all: remove these streams from model.backbone.out_indices'
            )
        ticket.done = True
        for static, grad in zip(self.grads, grads):
            static.copy_(grad)
        self.run_backward()
        # Autograd may use returned gradients as p.grad without a copy, and the next replay would
        # overwrite them: wrong sums with accumulative_counts=2. One copy per data type.
        flats = [flat.clone() for flat in self.flats]
        return [flats[index].as_strided(*place) for index, place in self.places]


def weights_of_products(module: nn.Module) -> list[nn.Parameter]:
    """Parameters in float32 that autocast casts, and that nothing else reads.

    Kernels of depth-wise convolutions read float32 weights directly.
    """
    held = Counter(p for part in module.modules() for p in part.parameters(recurse=False))
    layers = [part for part in module.modules() if is_plain(part, nn.Linear, nn.Conv2d)]
    dense = [layer for layer in layers if getattr(layer, 'groups', 1) == 1]
    parameters = [p for layer in dense for p in layer.parameters(recurse=False)]
    return [p for p in parameters if p.dtype == torch.float32 and held[p] == 1]


def graphed(model: nn.Module) -> GraphedForward:
    """Prepare CUDA graphs for the backbone of a model, without capturing or installing them."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    parts = [] if is_model_wrapper(model) else list(model.modules())
    kinds = {kind.__name__ for part in parts for kind in type(part).__mro__}
    if not parts or {'FullyShardedDataParallel', 'FSDPModule'} & kinds:
        raise ValueError(
            f'model={type(model).__name__} may move its parameters, as FSDP and DeepSpeed do, but '
            f'CUDA graphs need fixed addresses: use DistributedDataParallel, or {REMEDY}'
        )
    module = getattr(model, 'backbone', model)
    if any(getattr(part, 'with_cp', False) for part in module.modules()):
        raise ValueError(
            'with_cp=True restores random states, which CUDA graphs do not support: set '
            f'model.backbone.with_cp=False, or {REMEDY}'
        )
    if isinstance(module.forward, GraphedForward):
        del module.forward
    return GraphedForward(module)


def graph_backbone(
    model: nn.Module, images: Tensor, autocast_dtype: torch.dtype | None = None
) -> nn.Module:
    """Capture training of the backbone in CUDA graphs, for custom training loops.

    The ordinary forward function is still used for images of another shape, data type or memory
    format, for other modes or parameters than those of the capture, for a forward pass before the
    previous backward pass, and for copies of the model. The graphs launch the Triton kernels if
    these can run and no operator backend was requested. Other changes in the backbone, such as of
    rates or hooks, are not detected.

    Args:
        model (nn.Module): A model with a ``backbone``, or a bare one, in training mode on a GPU;
            it may be wrapped in ``DistributedDataParallel``. It is changed in place; ``del
            model.backbone.forward`` undoes that. Its weights do not change.
        images (Tensor): Images (B, C, H, W) like those that the backbone will get.
        autocast_dtype (torch.dtype, optional): Data type of ``torch.autocast`` in training.
            Defaults to None: training without autocast.

    Returns:
        nn.Module: The model.

    Raises:
        RuntimeError: If the model is not on a GPU, or the backbone cannot be captured.
        ValueError: If the model is in evaluation mode, sharded, or has ``with_cp=True``.

    Examples:
        >>> model = graph_backbone(model, images, torch.bfloat16)  # doctest: +SKIP
    """
    graph = graphed(model)
    if not graph.module.training:
        raise ValueError('model is in evaluation mode: call model.train() before graph_backbone')
    with torch.autocast(images.device.type, autocast_dtype, autocast_dtype is not None):
        graph.capture(images)
    graph.module.forward = graph
    return model


@HOOKS.register_module()
class CUDAGraphHook(Hook):
    """Capture the backbone in CUDA graphs in the first iteration of training.

    See :func:`mmhrformer.graph_backbone`, which does the same for custom training loops. With
    several GPUs, only the communication of the head's gradients overlaps with computation.
    Synchronized batch normalization puts NCCL's communication into the graphs.

    Examples:
        >>> custom_hooks = [dict(type='mmhrformer.CUDAGraphHook')]
    """

    def before_train(self, runner: Runner) -> None:
        """Replace the backbone's forward function by the graphs.

        Args:
            runner (Runner): The runner.
        """
        self.graphed = graphed(runner.model)
        self.graphed.module.forward = self.graphed

    def after_train(self, runner: Runner) -> None:
        """Log the number of replays, and restore the forward function.

        Args:
            runner (Runner): The runner.
        """
        graph = self.graphed
        runner.logger.info(f'CUDA graphs: {graph.replays} of {graph.calls} training passes')
        del graph.module.forward

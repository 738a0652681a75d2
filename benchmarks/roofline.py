"""Count the operations of a model on a GPU, and bound its speed; no GPU is needed.

    python benchmarks/roofline.py --arch small base --bandwidth 4.3 --tflops 790 --launch 4

The real modules run on the meta device in bfloat16 and channels-last memory. Every operator that is
not a view is one kernel, which reads its inputs and writes its outputs once; so are attention, as
on CUDA, and each operator of ``mmhrformer::``, whose floating-point operations are not counted.
Operators that are several kernels on CUDA count as such:

- a convolution adds its bias in a separate pass over its output (linear layers do not);
- batch normalization reads its input twice in training, for the statistics and to normalize;
- the backward pass of a convolution has a kernel for each gradient, that of a normalization one
  for the sums and one for the map.

Times are lower bounds by memory, tensor cores and launches; the longest of them applies. Training
is forward and backward pass, all of it in bfloat16, without stochastic depth.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter

import benchmark_peers as peers
import torch
import torch.nn.functional as F
from mmengine.utils import digit_version
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mmhrformer.ops.dispatch import BACKENDS

FIRST_TORCH = '2.5'  # the first whose checkpointing supports the meta device
MODELS = ('ours', 'ours-fused', 'mmpose', 'hrnet-w32', 'hrnet-w48', 'vit-s', 'vit-b')
COUNTED = {'fused', 'padded', 'with-cp'}
BATCH_SIZES = {'infer': 64, 'train': 32}
aten = torch.ops.aten
# Views that torch does not mark as such, and operators that only allocate.
FREE = {'_unsafe_view', '_reshape_alias', 'detach', 'alias', 'lift_fresh', 'empty', 'empty_like'}
FREE |= {'empty_strided', 'new_empty', 'new_empty_strided'}
WRITE_ONLY = {'copy_', 'fill_', 'zero_', 'bernoulli_'}


def size_of(*things: object) -> int:
    """Bytes of the tensors in nested lists, each counted once, without expanded axes.

    Examples:
        >>> size_of([torch.zeros(2, 3), torch.zeros(4).expand(5, 4)], 'text')
        40
    """
    tensors = {id(x): x for x in tree_flatten(things)[0] if isinstance(x, Tensor)}.values()
    sizes = ((x.itemsize, *(n for n, s in zip(x.shape, x.stride()) if s)) for x in tensors)
    return sum(map(math.prod, sizes))


def kernels_of(func: torch._ops.OpOverload, args: tuple, out: object) -> list[tuple]:
    """The tensors that each kernel of an operator on CUDA reads, and those that it writes."""
    name = func.overloadpacket.__name__
    if name == 'convolution' and args[2] is not None:
        return [(args[:2], out), ((out, args[2]), out)]
    if name == 'convolution_backward':
        grad, x, weight = args[:3]
        reads = (grad, weight), (grad, x), grad
        return [(read, grad) for read, grad in zip(reads, out) if grad is not None]
    if name == 'native_batch_norm' and args[5]:
        return [(args[0], out[1:]), (args, out[0])]
    if name in ('native_batch_norm_backward', 'native_layer_norm_backward'):
        return [(args[:2], out[1:]), (args, out[0])]
    return [(args[1:] if name in WRITE_ONLY else args, out)]


class Count(TorchDispatchMode):
    """Counter of the kernels, bytes and floating-point operations of the code inside.

    Attributes:
        operators (int): Number of operators with kernels.
        kernels (Counter): Name of an operator -> number of kernels.
        bytes (Counter): Name of an operator -> bytes read and written.
        flops (int): Floating-point operations of products and convolutions; a multiply-add is two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.flops = 0
        self.kernels, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in FREE:
            return out
        if name == 'convolution' and is_channels_last(args[0]):  # meta kernels lose the format
            out = torch.empty_like(out, memory_format=torch.channels_last)
        self.operators += 1
        for read, written in kernels_of(func, args, out):
            self.kernels[name] += 1
            self.bytes[name] += size_of(read, kwargs) + size_of(written)
        if formula := flop_counter.flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def is_channels_last(x: Tensor) -> bool:
    """Whether a map (B, C, H, W) is channels-last in memory, and not also contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class FusedAttention(TorchFunctionMode):
    """Attention as a single operator, as on CUDA; for meta tensors, torch uses the formula."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call a function, or its substitute."""
        return (attend if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_) -> Tensor:
    """The memory-efficient kernel on (B, heads, N, head_dim), which supports a learned bias."""
    mask = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
    keeps = torch.is_grad_enabled() and q.requires_grad
    kernel = aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, mask, keeps, dropout_p, is_causal, scale=scale)[0]


def count(
    network: nn.Module, size: tuple[int, ...], mode: str = 'infer', backend: str = 'cuda'
) -> Count:
    """Count a pass of a network over images, or a training step.

    Args:
        network (nn.Module): Network from images to one or more tensors; moved to the meta device.
        size (tuple[int, ...]): Shape (B, 3, H, W) of the images.
        mode (str): ``'infer'`` or ``'train'``. Defaults to ``'infer'``.
        backend (str): A key of :data:`mmhrformer.ops.dispatch.BACKENDS`. Defaults to ``'cuda'``.

    Returns:
        Count: The counts.

    Raises:
        BenchmarkError: If torch is too old.
    """
    if digit_version(torch.__version__) < digit_version(FIRST_TORCH):
        raise peers.BenchmarkError(f'torch {torch.__version__}: use torch {FIRST_TORCH} or newer')
    network = network.to('meta', torch.bfloat16, memory_format=torch.channels_last)
    network.train(mode == 'train')
    images = torch.empty(size, dtype=torch.bfloat16, device='meta')
    images = images.to(memory_format=torch.channels_last)
    # On the meta device, Triton kernels are not really launched.
    with peers.use(backend), FusedAttention(), Count() as counted:
        with torch.set_grad_enabled(mode == 'train'):
            outs = network(images)
        if mode == 'train':
            outs = [outs] if isinstance(outs, Tensor) else outs
            torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
    return counted


def bounds(counted: Count, args: argparse.Namespace) -> dict[str, float]:
    """Lower bounds in milliseconds by memory, tensor cores and launches."""
    return dict(
        memory=counted.bytes.total() / args.bandwidth / 1e9,
        tensor=counted.flops / args.tflops / 1e9,
        launch=counted.kernels.total() * args.launch / 1e3,
    )


def print_row(name: str, counted: Count, batch: int, args: argparse.Namespace) -> None:
    """Print the counts of a model, and its operators with the most bytes."""
    times = bounds(counted, args)
    longest = max(times, key=times.get)
    flops, size = counted.flops / batch / 1e9, counted.bytes.total() / batch / 1e6
    row = f'{name:<32} {flops:12.1f} {size:8.0f} {counted.kernels.total():8d}'
    row += ''.join(f' {time:8.2f}' for time in times.values())
    print(f'{row} {batch / times[longest] * 1e3:11.0f}  {longest}', flush=True)
    for operator, size in counted.bytes.most_common(args.operators):
        print(f'    {operator:<52} {size / batch / 1e6:.0f} MB {counted.kernels[operator]:6d}')


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add = parser.add_argument
    add('--task', choices=peers.CONFIGS, default='pose')
    add('--arch', nargs='+', default=['small', 'base'], help='architectures of ours and mmpose')
    add('--models', nargs='+', default=MODELS, help='models, as in tools/benchmark.py')
    add('--mode', nargs='+', choices=BATCH_SIZES, default=list(BATCH_SIZES))
    add('--backends', nargs='+', choices=BACKENDS, default=['cuda'], help='of our operators')
    add('--size', nargs=2, type=int, default=[256, 192], help='height and width')
    add('--batch-size', type=int, help='(64, and 32 in training)')
    add('--bandwidth', type=float, default=3.0, help='memory bandwidth, TB/s')
    add('--tflops', type=float, default=790.0, help='peak rate of the tensor cores')
    add('--launch', type=float, default=4.0, help='time to launch a kernel, us')
    add('--operators', type=int, default=0, help='number of most expensive operators to list')
    return parser


def print_rows(spec: peers.Spec, arch: str, args: argparse.Namespace) -> None:
    """Build a model for each mode and backend, and print its costs."""
    if spec.suffixes - COUNTED:
        raise peers.BenchmarkError(f'only the suffixes {sorted(COUNTED)} affect the counts')
    peers.check_models(args.task, arch, [spec])
    ours = spec.base == 'ours'
    for mode in args.mode:
        if peers.why_unavailable(spec, mode, 'cpu'):
            continue
        batch = args.batch_size or BATCH_SIZES[mode]
        for backend in args.backends if ours else args.backends[:1]:
            with peers.use(backend):  # determines the head padding of folded models
                network = peers.build_network(spec, args.task, arch, args.size)
            name = f'{spec.name} {arch}' if spec.base in peers.SAME_WEIGHTS else spec.name
            name += f' {backend}' if len(args.backends) > 1 and ours else ''
            counted = count(network, (batch, 3, *args.size), mode, backend)
            print_row(f'{name}, {mode} {batch}', counted, batch, args)


def main() -> None:
    """Count all models, and print a table."""
    args = make_parser().parse_args()
    print(f'{"":<32}  GFLOP/image MB/image launches   memory   tensor   launch ms images/s')
    for name in args.models:
        try:
            spec = peers.parse_spec(name)
            for arch in args.arch if spec.base in peers.SAME_WEIGHTS else args.arch[:1]:
                print_rows(spec, arch, args)
        except peers.BenchmarkError as err:
            print(f'{name:<32} skipped: {err}')


if __name__ == '__main__':
    main()

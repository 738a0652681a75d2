"""Window attention directly on the map, forward and backward, as Triton kernels.

Windows are read from the map and written to it, never copied, and only the arguments are kept for
the backward pass. Import this only where Triton can run.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .state import needs_grad
from .triton_launch import Launch, planned
from .triton_support import DTYPES, refuse_second_derivatives, thin_operator
from .windows import window_count

# Overrides of launch_options() for each kernel, for measurements.
OPTIONS: dict[str, dict] = {'forward': {}, 'queries': {}, 'keys': {}, 'reduce': {}}


def launch_options(kernel: str, block_n: int, block_d: int, dtype: torch.dtype) -> dict:
    """Choose the launch options of a kernel.

    Args:
        kernel (str): A key of :data:`OPTIONS`.
        block_n (int): Tokens of a window, rounded up to a power of two.
        block_d (int): Channels of a head, rounded up to a power of two.
        dtype (torch.dtype): Data type of the map.

    Returns:
        dict: ``block``, the queries (or keys) of a program; ``programs``, their maximum number
        (each loops over many windows, for which it gathers the biases once, and writes
        ``block`` x N partial sums of their gradients); and Triton's own options. For the kernel
        'reduce': ``block``, the table entries of a program.
    """
    if kernel == 'reduce':
        return dict(block=1, num_warps=4) | OPTIONS[kernel]
    # Windows of 7 x 7 fit into the registers as one block, larger ones do not; in float32, where a
    # product is three TF32 ones, not even the backward pass of 7 x 7 does. Otherwise, blocks have
    # more columns than rows, so that Triton distributes the columns over the warps (rows would be
    # computed several times).
    half = dtype != torch.float32
    fits = {'forward': half or block_d == 32, 'queries': half, 'keys': False}
    whole = block_n <= 64 and fits[kernel]
    options = dict(
        block=block_n if whole else min(block_n, block_d // 2 if half else 16),
        programs=528 if kernel == 'forward' else 264,  # 4 and 2 per each of 132 multiprocessors
        num_warps=4 if whole else 8,
        num_stages=1,  # with 2, HRFormer-B's widest map takes 211 us instead of 84 on an H200
    )
    return options | OPTIONS[kernel]


# Beyond these, neither keys nor logits fit into a multiprocessor.
MAX_WINDOW, MAX_HEAD_DIM = 16, 64
LOG2E = tl.constexpr(1.4426950408889634)
SIZES = ['B', 'H', 'W']  # not specialized: alignment follows from the channels, which are


@triton.jit
def _tokens(BLOCK: tl.constexpr, WIN: tl.constexpr):
    """Tokens of this program's block, known to start at 0 if it is the whole window."""
    tokens = tl.arange(0, BLOCK)
    if BLOCK < WIN * WIN:
        tokens += tl.program_id(1) * BLOCK
    return tokens


@triton.jit
def _divide(a, b):
    """Quotient of numbers that are not negative, which takes fewer instructions than others."""
    return (tl.cast(a, tl.uint32) // tl.cast(b, tl.uint32)).to(tl.int32)


@triton.jit
def _window(index, t, H, W, WIN: tl.constexpr):
    """First token of a window's image, places of tokens t after it, and which of them are real."""
    rows, cols = (H + WIN - 1) // WIN, (W + WIN - 1) // WIN
    row = _divide(index, cols)
    image = _divide(row, rows)
    y = (row - image * rows) * WIN - (rows * WIN - H) // 2 + t // WIN
    x = (index - row * cols) * WIN - (cols * WIN - W) // 2 + t % WIN
    # As unsigned numbers, negative ones are larger than any size.
    real = (y.to(tl.uint32) < tl.cast(H, tl.uint32)) & (x.to(tl.uint32) < tl.cast(W, tl.uint32))
    return image.to(tl.int64) * H * W, (y * W + x).to(tl.int64), real & (t < WIN * WIN)


@triton.jit
def _bias(table, q, k, head, HEADS: tl.constexpr, WIN: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Biases of queries and keys, times log2(e) for exp2; -inf beyond the window."""
    N: tl.constexpr = WIN * WIN
    dy = q // WIN - k // WIN + WIN - 1
    dx = q % WIN - k % WIN + WIN - 1
    if HAS_BIAS:
        entry = (dy * (2 * WIN - 1) + dx) * HEADS + head
        bias = tl.load(table + entry, mask=(q < N) & (k < N), other=0.0).to(tl.float32) * LOG2E
    else:
        bias = dy.to(tl.float32) * 0.0
    return tl.where(k < N, bias, float('-inf'))


@triton.jit
def _rows(x, pad, at, real, d):
    """Pointers to channels of tokens, which for padded tokens are those of ``pad``.

    Triton 3.8 no longer sees that these are contiguous and aligned, and loads 16 bits at a time, if
    pointers to rows are selected before the channels are added.
    """
    return tl.where(real[:, None], x + at[:, None] + d[None, :], (pad + d)[None, :])


@triton.jit
def _load(x, real, d, HD: tl.constexpr, PAD_MASK: tl.constexpr):
    """Keys or values of tokens, padded ones included, from the pointers ``x``."""
    mask = (d < HD)[None, :]
    if PAD_MASK:
        mask = real[:, None] & mask
    return tl.load(x, mask=mask, other=0.0)


@triton.jit
def _add_tokens(sums, x, in_d):
    """Add the rows of x to sums of this program, in memory to save registers.

    No other program adds to them, so the order is deterministic.
    """
    tl.atomic_add(sums, tl.sum(x.to(tl.float32), 0), mask=in_d, sem='relaxed')


@triton.jit(do_not_specialize=SIZES)
def _forward(
    qkv, pad, table, out, B, H, W, scale,
    HEADS: tl.constexpr, HD: tl.constexpr, WIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    PAD_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program handles one head and one block of queries, and loops over windows."""
    C: tl.constexpr = HEADS * HD
    head = tl.program_id(0) % HEADS
    m = _tokens(BLOCK, WIN)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_d = d < HD
    bias = _bias(table, m[:, None], n[None, :], head, HEADS, WIN, HAS_BIAS)
    pad += head * HD
    windows = B * ((H + WIN - 1) // WIN) * ((W + WIN - 1) // WIN)
    for window in range(tl.program_id(0) // HEADS, windows, tl.num_programs(0) // HEADS):
        start, at_n, real = _window(window, n, H, W, WIN)
        start, at_m, real_q = _window(window, m, H, W, WIN)
        source = qkv + start * (3 * C) + head * HD
        mask = real_q[:, None] & in_d[None, :]
        # The same pointers if the block is the whole window, which saves registers.
        x_m = _rows(source, pad, at_m * (3 * C), real_q, d)
        x_n = _rows(source, pad, at_n * (3 * C), real, d)
        q = tl.load(x_m, mask=mask, other=0.0)
        k = _load(x_n + C, real, d, HD, PAD_MASK)
        v = _load(x_n + 2 * C, real, d, HD, PAD_MASK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        if PAD_MASK:
            s = tl.where(real[None, :], s, float('-inf'))
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (1.0 / tl.sum(p, 1))[:, None]
        target = out + start * C + head * HD + at_m[:, None] * C + d[None, :]
        tl.store(target, o.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _grad_queries(
    qkv, pad, table, grad, grad_qkv, part_bias, part_sums, stats, B, H, W, scale,
    HEADS: tl.constexpr, HD: tl.constexpr, WIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    PAD_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries, and of keys and values as well if it is the whole window.

    A program loops over windows and sums the gradients of the biases in registers. These sums go to
    its part of ``part_bias`` (chunks, HEADS, N, N), the sums of dq and do over all tokens to
    ``part_sums`` (chunks * blocks, 2, C). If a block is not the whole window, the logarithms of
    the softmax denominators and the sums of p * dp of its queries go to ``stats``
    (HEADS, 2, B, H, W).

    For heads of 40 channels, the registers are just enough in this order: test any other for
    spills, by benchmarks/triton_resources.py.
    """
    N: tl.constexpr = WIN * WIN
    WHOLE: tl.constexpr = BLOCK >= N
    C: tl.constexpr = HEADS * HD
    head, chunk = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    m = _tokens(BLOCK, WIN)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_d = d < HD
    bias = _bias(table, m[:, None], n[None, :], head, HEADS, WIN, HAS_BIAS)
    pad += head * HD
    row = chunk * tl.num_programs(1) + tl.program_id(1)
    sums = part_sums + row * 2 * C + head * HD + d
    tl.store(sums, tl.zeros((BLOCK_D,), tl.float32), mask=in_d)
    tl.store(sums + C, tl.zeros((BLOCK_D,), tl.float32), mask=in_d)
    tl.debug_barrier()
    sum_ds = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    windows = B * ((H + WIN - 1) // WIN) * ((W + WIN - 1) // WIN)
    for window in range(chunk, windows, tl.num_programs(0) // HEADS):
        start, at_n, real = _window(window, n, H, W, WIN)
        start, at_m, real_q = _window(window, m, H, W, WIN)
        source = qkv + start * (3 * C) + head * HD
        target = grad_qkv + start * (3 * C) + head * HD
        mask = real_q[:, None] & in_d[None, :]
        x_m = _rows(source, pad, at_m * (3 * C), real_q, d)
        x_n = _rows(source, pad, at_n * (3 * C), real, d)
        q = tl.load(x_m, mask=mask, other=0.0)
        k = _load(x_n + C, real, d, HD, PAD_MASK)
        do = tl.load(
            grad + start * C + head * HD + at_m[:, None] * C + d[None, :], mask=mask, other=0.0
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        if PAD_MASK:
            s = tl.where(real[None, :], s, float('-inf'))
        largest = tl.max(s, 1)
        p = tl.exp2(s - largest[:, None])
        total = tl.sum(p, 1)
        p = p * (1.0 / total)[:, None]
        if WHOLE:
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
            to_n = target + (at_n * (3 * C))[:, None] + d[None, :]
            mask_n = real[:, None] & in_d[None, :]
            tl.store(to_n + 2 * C, dv.to(grad_qkv.dtype.element_ty), mask=mask_n)
        else:
            place = stats + head.to(tl.int64) * 2 * (B * H * W) + start + at_m
            tl.store(place, largest + tl.log2(total), mask=real_q)
        _add_tokens(sums + C, do, in_d)
        v = _load(x_n + 2 * C, real, d, HD, PAD_MASK)
        p_dp = p * tl.dot(do, tl.trans(v), input_precision=PRECISION)
        delta = tl.sum(p_dp, 1)
        if not WHOLE:
            tl.store(place + B * H * W, delta, mask=real_q)
        # p * (dp - delta) would be fused into the sum below, with p and dp in registers until then.
        ds = p_dp - p * delta[:, None]
        if HAS_BIAS:
            sum_ds += ds
        low = ds.to(q.dtype)
        dq = tl.dot(low, k, input_precision=PRECISION) * scale
        to_m = target + (at_m * (3 * C))[:, None] + d[None, :]
        tl.store(to_m, dq.to(grad_qkv.dtype.element_ty), mask=mask)
        _add_tokens(sums, dq, in_d)
        if WHOLE:
            dk = tl.dot(tl.trans(low), q, input_precision=PRECISION) * scale
            tl.store(to_n + C, dk.to(grad_qkv.dtype.element_ty), mask=mask_n)
    if HAS_BIAS:
        place = part_bias + (chunk * HEADS + head) * N * N + m[:, None] * N + n[None, :]
        tl.store(place, sum_ds, mask=(m < N)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _grad_keys(
    qkv, pad, table, grad, grad_qkv, stats, B, H, W, scale,
    HEADS: tl.constexpr, HD: tl.constexpr, WIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    PAD_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values from all queries, after :func:`_grad_queries`."""
    C: tl.constexpr = HEADS * HD
    head, chunk = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    n = _tokens(BLOCK, WIN)
    m = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_d = d < HD
    bias = _bias(table, m[None, :], n[:, None], head, HEADS, WIN, HAS_BIAS)  # (keys, queries)
    pad += head * HD
    windows = B * ((H + WIN - 1) // WIN) * ((W + WIN - 1) // WIN)
    for window in range(chunk, windows, tl.num_programs(0) // HEADS):
        start, at_n, real = _window(window, n, H, W, WIN)
        start, at_m, real_q = _window(window, m, H, W, WIN)
        source = qkv + start * (3 * C) + head * HD
        target = grad_qkv + start * (3 * C) + head * HD
        mask = real_q[:, None] & in_d[None, :]
        q = tl.load(source + at_m[:, None] * (3 * C) + d[None, :], mask=mask, other=0.0)
        do = tl.load(
            grad + start * C + head * HD + at_m[:, None] * C + d[None, :], mask=mask, other=0.0
        )
        x_n = _rows(source, pad, at_n * (3 * C), real, d)
        k = _load(x_n + C, real, d, HD, PAD_MASK)
        v = _load(x_n + 2 * C, real, d, HD, PAD_MASK)
        place = stats + head.to(tl.int64) * 2 * (B * H * W) + start + at_m
        log = tl.load(place, mask=real_q, other=float('inf'))  # p = 0
        delta = tl.load(place + B * H * W, mask=real_q, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) + bias
        if PAD_MASK:
            s = tl.where(real[:, None], s, float('-inf'))
        p = tl.exp2(s - log[None, :])
        dv = tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, input_precision=PRECISION) * scale
        mask = real[:, None] & in_d[None, :]
        to_n = target + (at_n * (3 * C))[:, None] + d[None, :]
        tl.store(to_n + C, dk.to(grad_qkv.dtype.element_ty), mask=mask)
        tl.store(to_n + 2 * C, dv.to(grad_qkv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['chunks', 'rows'])
def _reduce(
    part_bias, part_sums, grad_table, grad_pad, chunks, rows,
    HEADS: tl.constexpr, HD: tl.constexpr, WIN: tl.constexpr, NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add partial sums in a deterministic order: a program handles BLOCK numbers of the table.

    The first programs add ``part_bias`` (chunks, HEADS, N, N) over all pairs of tokens that share
    one of the NUMBERS of the table (entries, HEADS), the others ``part_sums`` (rows, 2, C), the
    gradient of queries and values in ``grad_pad`` (3, C). That of the keys is zero.
    """
    N: tl.constexpr = WIN * WIN
    C: tl.constexpr = HEADS * HD
    PROGRAMS: tl.constexpr = (NUMBERS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    r = tl.arange(0, BLOCK * BLOCK_R)
    n = tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK * BLOCK_R, BLOCK_N), tl.float32)
    if program < PROGRAMS:
        number = (program * BLOCK + r // BLOCK_R)[:, None]
        entry, head = number // HEADS, number % HEADS
        y = n // WIN + entry // (2 * WIN - 1) - WIN + 1
        x = n % WIN + entry % (2 * WIN - 1) - WIN + 1
        pair = (number < NUMBERS) & (n < N) & (y >= 0) & (y < WIN) & (x >= 0) & (x < WIN)
        place = part_bias + head * (N * N) + (y * WIN + x) * N + n
        for first in range(0, chunks, BLOCK_R):
            chunk = (first + r % BLOCK_R)[:, None]
            at = chunk * (HEADS * N * N)
            total += tl.load(place + at, mask=pair & (chunk < chunks), other=0.0)
        entries = tl.sum(tl.reshape(total, (BLOCK, BLOCK_R * BLOCK_N)), 1)
        numbers = program * BLOCK + tl.arange(0, BLOCK)
        entries = entries.to(grad_table.dtype.element_ty)
        tl.store(grad_table + numbers, entries, mask=numbers < NUMBERS)
    else:
        c = (program - PROGRAMS) * BLOCK_N + tl.arange(0, BLOCK_N)
        for first in range(0, rows, BLOCK * BLOCK_R):
            row = (first + r)[:, None]
            real = (row < rows) & (c < 2 * C)[None, :]
            total += tl.load(part_sums + row * (2 * C) + c[None, :], mask=real, other=0.0)
        sums = tl.sum(total, 0).to(grad_pad.dtype.element_ty)
        tl.store(grad_pad + c + tl.where(c < C, 0, C), sums, mask=c < 2 * C)
        tl.store(grad_pad + C + c, tl.zeros_like(sums), mask=c < C)


def _block(size: int, least: int) -> int:
    return max(least, triton.next_power_of_2(size))


def _plan(
    kernel: str, shape: tuple[int, ...], dtype: torch.dtype, heads: int, window: int,
    has_bias: bool, pad_mask: bool,
) -> tuple[tuple[int, int], dict]:  # fmt: skip
    """Grid and keyword arguments of a kernel on maps (B, H, W, 3C)."""
    B, H, W, C3 = shape
    head_dim = C3 // 3 // heads
    block_n, block_d = _block(window**2, least=16), _block(head_dim, least=32)
    options = launch_options(kernel, block_n, block_d, dtype)
    block, programs = options.pop('block'), options.pop('programs')
    blocks = triton.cdiv(window**2, block)
    windows = B * window_count(H, window) * window_count(W, window)
    per = max(1, triton.cdiv(windows * heads * blocks, programs))
    keywords = dict(
        HEADS=heads,
        HD=head_dim,
        WIN=window,
        HAS_BIAS=has_bias,
        PAD_MASK=pad_mask,
        BLOCK=block,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        PRECISION='tf32x3' if dtype == torch.float32 else 'tf32',
    )
    return (triton.cdiv(windows, per) * heads, blocks), keywords | options


def _plan_reduce(plan: dict) -> tuple[int, dict]:
    """Number of programs of :func:`_reduce` and its keywords, from those of a kernel on maps."""
    keywords = {name: plan[name] for name in ('HEADS', 'HD', 'WIN', 'BLOCK_N')}
    heads, block_n = plan['HEADS'], plan['BLOCK_N']
    options = launch_options('reduce', block_n, plan['BLOCK_D'], torch.float32)
    block = options.pop('block')
    numbers = (2 * plan['WIN'] - 1) ** 2 * heads if plan['HAS_BIAS'] else 0
    keywords.update(NUMBERS=numbers, BLOCK=block, BLOCK_R=4096 // block_n)
    programs = triton.cdiv(numbers, block) + triton.cdiv(2 * heads * plan['HD'], block_n)
    return programs, keywords | options


def _plan_forward(scale: float, shape: tuple[int, ...], *options) -> Launch:
    """The launch of the forward pass; the options are those of :func:`_plan`."""
    grid, keywords = _plan('forward', shape, *options)
    return Launch(_forward, grid, *shape[:3], scale, **keywords)


def _plan_backward(
    scale: float, shape: tuple[int, ...], *options
) -> tuple[Launch, Launch | None, Launch]:
    """The launches for queries, for keys (None if one launch does both), and for the sums."""
    grid, keywords = _plan('queries', shape, *options)
    sizes, whole, keys = (*shape[:3], scale), grid[1] == 1, None
    queries = Launch(_grad_queries, grid, *sizes, **keywords)
    chunks = grid[0] // keywords['HEADS']
    rows = chunks * grid[1]
    if not whole:
        grid, keywords_keys = _plan('keys', shape, *options)
        keys = Launch(_grad_keys, grid, *sizes, **keywords_keys)
    programs, keywords = _plan_reduce(keywords)
    return queries, keys, Launch(_reduce, (programs,), chunks, rows, **keywords)


ARGUMENTS = (
    'Tensor qkv, Tensor pad, Tensor? table, int heads, int window, float scale, bool pad_mask'
)


@thin_operator(
    f'window_attention({ARGUMENTS}) -> Tensor',
    lambda qkv, *_: qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3),
)
def attention_forward(
    qkv: Tensor, pad: Tensor, table: Tensor | None, heads: int, window: int, scale: float,
    pad_mask: bool,
) -> Tensor:  # fmt: skip
    """Attention without gradients, see :func:`window_attention`."""
    qkv, pad, shape = qkv.contiguous(), pad.to(qkv.dtype).contiguous(), qkv.shape
    out = qkv.new_empty((*shape[:3], shape[3] // 3))
    options = qkv.dtype, heads, window, table is not None, pad_mask
    launch = planned(_plan_forward, scale, shape, *options)
    launch(qkv, pad, pad if table is None else table.contiguous(), out)
    return out


def _empty_grads(qkv: Tensor, pad: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients."""
    table = pad.new_empty(0) if table is None else table
    return tuple(like.new_empty(like.shape) for like in (qkv, pad, table))


@thin_operator(
    f'window_attention_backward(Tensor grad, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)',
    lambda grad, qkv, pad, table, *_: _empty_grads(qkv, pad, table),
)
def attention_backward(
    grad: Tensor, qkv: Tensor, pad: Tensor, table: Tensor | None, heads: int, window: int,
    scale: float, pad_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv, pad and table, of their shapes; the last is empty without a table.

    ``grad`` is that of the output, (B, H, W, heads * head_dim).
    """
    grad, qkv = grad.contiguous(), qkv.contiguous()
    options = qkv.dtype, heads, window, table is not None, pad_mask
    queries, keys, reduce = planned(_plan_backward, scale, qkv.shape, *options)
    chunks, rows = reduce.numbers
    B, H, W, C3 = qkv.shape
    empty = partial(qkv.new_empty, dtype=torch.float32)
    part_bias = empty(1) if table is None else empty(chunks, heads, window**2, window**2)
    part_sums = empty(rows, 2, C3 // 3)
    stats = empty(heads, 2, B, H, W) if keys else empty(1)
    grads = grad_qkv, grad_pad, grad_table = _empty_grads(qkv, pad, table)
    pad = pad.to(qkv.dtype).contiguous()
    sources = (qkv, pad, pad if table is None else table.contiguous())
    queries(*sources, grad, grad_qkv, part_bias, part_sums, stats)
    if keys:
        keys(*sources, grad, grad_qkv, stats)
    reduce(part_bias, part_sums, grad_table, grad_pad)
    return grads


class WindowAttention(torch.autograd.Function):
    """See :func:`window_attention`."""

    @staticmethod
    def forward(ctx, qkv: Tensor, pad: Tensor, table: Tensor | None, *options) -> Tensor:
        """Attend, keeping only the inputs."""
        ctx.save_for_backward(qkv, pad, table)
        ctx.options = options
        return attention_forward(qkv, pad, table, *options)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors."""
        refuse_second_derivatives('window_attention')
        qkv, pad, table = ctx.saved_tensors
        grads = attention_backward(grad, qkv, pad, table, *ctx.options)
        return *grads[:2], None if table is None else grads[2], None, None, None, None


def window_attention(
    qkv: Tensor,
    pad: Tensor,
    table: Tensor | None,
    num_heads: int,
    window: int,
    scale: float,
    pad_mask: bool = False,
) -> Tensor:
    """Multi-head attention in the windows of a map, as one operator.

    Gradients of ``qkv``, ``pad`` and ``table`` are deterministic. Logits, softmax and sums are in
    float32; a product of float32 numbers is computed as three TF32 products, without a relevant
    loss of accuracy.

    Args:
        qkv (Tensor): Queries, keys and values of the tokens of a map, not padded, of shape
            (B, H, W, 3 * num_heads * head_dim): float32, float16 or bfloat16.
        pad (Tensor): Query, key and value of padded tokens, of shape
            (3 * num_heads * head_dim,): the bias of the projection. Of any data type. Its gradient
            is that of the bias in all tokens, so project ``qkv`` with ``pad.detach()``.
        table (Tensor, optional): Relative position biases of shape
            ((2 * window - 1)^2, num_heads), of any data type. None: no biases.
        num_heads (int): Heads.
        window (int): Side of the square windows, in tokens, centered on the map.
        scale (float): Factor of the products of queries and keys.
        pad_mask (bool): Whether padded tokens are hidden from the others. Defaults to False.

    Returns:
        Tensor: Weighted sums of the values, of shape (B, H, W, num_heads * head_dim), in the data
        type of ``qkv``.

    Raises:
        ValueError: If a shape or data type is not supported, or ``window`` > 16, or head_dim > 64.

    Examples:
        >>> import torch
        >>> from mmhrformer.ops.triton_attention import window_attention
        >>> device = 'meta'  # 'cuda' computes, too
        >>> qkv = torch.empty(2, 8, 6, 96, device=device)
        >>> pad, table = torch.empty(96, device=device), torch.empty(169, 2, device=device)
        >>> window_attention(qkv, pad, table, num_heads=2, window=7, scale=0.25).shape
        torch.Size([2, 8, 6, 32])
    """
    _check(qkv, pad, table, num_heads, window)
    run = WindowAttention.apply if needs_grad(qkv, pad, table) else attention_forward
    return run(qkv, pad, table, num_heads, window, scale, pad_mask)


def _check(qkv: Tensor, pad: Tensor, table: Tensor | None, num_heads: int, window: int) -> None:
    C3 = qkv.shape[-1]
    if qkv.dim() != 4 or C3 % (3 * num_heads):
        raise ValueError(
            f'qkv has shape {tuple(qkv.shape)}: expected (B, H, W, 3 * {num_heads} * head_dim)'
        )
    if qkv.dtype not in DTYPES:
        raise ValueError(f'qkv is {qkv.dtype}: expected float32, float16 or bfloat16')
    if pad.shape != (C3,):
        raise ValueError(
            f'pad has shape {tuple(pad.shape)}: expected one number per channel, ({C3},)'
        )
    if table is not None and table.shape != ((2 * window - 1) ** 2, num_heads):
        raise ValueError(
            f'table has shape {tuple(table.shape)}: expected ({(2 * window - 1) ** 2}, '
            f'{num_heads}) for window={window} and num_heads={num_heads}'
        )
    if window > MAX_WINDOW or C3 // 3 // num_heads > MAX_HEAD_DIM:
        raise ValueError(
            f'window={window} and head_dim={C3 // 3 // num_heads} are too large for the kernel, '
            f'which supports up to {MAX_WINDOW} and {MAX_HEAD_DIM}: use mmhrformer.ops.sdpa instead'
        )

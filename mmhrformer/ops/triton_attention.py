"""Window attention on the map itself, forward and backward, as Triton kernels.

A map is read and written in place: windows are never copied, and nothing is kept for the backward
pass but the arguments. Import this only where :func:`mmhrformer.ops.triton_support.available`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton
from triton.runtime.interpreter import InterpretedFunction

from .windows import window_count

# How each kernel is launched, by whether a window fits into one block of SMALL tokens:
# ``block``, the queries (or keys) of a program, all of them if 0; ``per``, the windows of a
# program, for which it gathers the biases once; ``programs``, how many there are at most, each of
# which leaves a partial sum of the bias gradients (2,401 numbers for windows of 7 x 7, 7,200 for 32
# queries of 15 x 15); the rest is Triton's.
SMALL = 64
FORWARD = {
    True: dict(block=0, per=8, num_warps=4, num_stages=1),
    False: dict(block=32, per=4, num_warps=8, num_stages=1),
}
QUERIES = {
    True: dict(block=0, programs=264, num_warps=4, num_stages=1),
    False: dict(block=32, programs=264, num_warps=8, num_stages=1),
}
KEYS = {False: dict(block=32, programs=528, num_warps=8, num_stages=1)}

LOG2E = tl.constexpr(1.4426950408889634)
SIZES = ['B', 'H', 'W']  # never compiled for: strides are multiples of the channels, which are


@triton.jit
def _window(index, t, H, W, WIN: tl.constexpr):
    """Where a window starts, as a row of the map; which of its tokens are real; if all are."""
    rows, cols = (H + WIN - 1) // WIN, (W + WIN - 1) // WIN
    y = (index // cols) % rows * WIN - (rows * WIN - H) // 2
    x = index % cols * WIN - (cols * WIN - W) // 2
    start = ((index // (rows * cols)).to(tl.int64) * H + y) * W + x
    inside = (y + t // WIN >= 0) & (y + t // WIN < H) & (x + t % WIN >= 0) & (x + t % WIN < W)
    full = (y >= 0) & (y + WIN <= H) & (x >= 0) & (x + WIN <= W)
    return start, inside & (t < WIN * WIN), full


@triton.jit
def _bias(table, q, k, head, HEADS: tl.constexpr, WIN: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Biases of queries and keys, times log2(e) as exp2 is what there is; -inf for no token."""
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
def _load(x, real, in_d, pad, PAD_MASK: tl.constexpr):
    """Keys or values of a window, those of padded tokens included."""
    x = tl.load(x, mask=real[:, None] & in_d[None, :], other=0.0)
    if not PAD_MASK:
        x = tl.where(real[:, None], x, pad[None, :].to(x.dtype))
    return x


@triton.jit(do_not_specialize=SIZES)
def _forward(
    qkv, pad, table, out, B, H, W, scale,
    HEADS: tl.constexpr, HD: tl.constexpr, WIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    PAD_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program has a head and a block of queries, and goes through windows with all their keys."""
    C: tl.constexpr = HEADS * HD
    head = tl.program_id(0) % HEADS
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_d = d < HD
    at_m = (m // WIN * W + m % WIN)[:, None]
    at_k = (n // WIN * W + n % WIN)[:, None] * (3 * C) + C + d[None, :]
    bias = _bias(table, m[:, None], n[None, :], head, HEADS, WIN, HAS_BIAS)
    pad_k = tl.load(pad + C + head * HD + d, mask=in_d, other=0.0)
    pad_v = tl.load(pad + 2 * C + head * HD + d, mask=in_d, other=0.0)
    windows = B * ((H + WIN - 1) // WIN) * ((W + WIN - 1) // WIN)
    for window in range(tl.program_id(0) // HEADS, windows, tl.num_programs(0) // HEADS):
        start, real, full = _window(window, n, H, W, WIN)
        start, real_q, full = _window(window, m, H, W, WIN)
        source = qkv + start * (3 * C) + head * HD
        mask = real_q[:, None] & in_d[None, :]
        q = tl.load(source + at_m * (3 * C) + d[None, :], mask=mask, other=0.0)
        k = _load(source + at_k, real, in_d, pad_k, PAD_MASK)
        v = _load(source + at_k + C, real, in_d, pad_v, PAD_MASK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        if PAD_MASK:
            s = tl.where(real[None, :], s, float('-inf'))
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / tl.sum(p, 1)[:, None]
        target = out + start * C + head * HD + at_m * C + d[None, :]
        tl.store(target, o.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _grad_queries(
    qkv, pad, table, grad, grad_qkv, part_bias, part_pad, stats, B, H, W, scale,
    HEADS: tl.constexpr, HD: tl.constexpr, WIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    PAD_MASK: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries, and of keys and values, too, if it is the WHOLE window.

    A program goes through windows and adds the gradients of the biases in registers; they, and
    those of padded tokens, go to its own place of ``part_bias`` (chunks, HEADS, N, N) and
    ``part_pad`` (chunks, 2, C). If a block is not the whole window, the logarithms of the
    denominators and the sums of p * dp of its queries go to ``stats`` (2, HEADS, B, H, W).
    """
    N: tl.constexpr = WIN * WIN
    C: tl.constexpr = HEADS * HD
    head, chunk = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_d = d < HD
    at_m = m // WIN * W + m % WIN
    at_q = at_m[:, None] * (3 * C) + d[None, :]
    at_k = (n // WIN * W + n % WIN)[:, None] * (3 * C) + C + d[None, :]
    bias = _bias(table, m[:, None], n[None, :], head, HEADS, WIN, HAS_BIAS)
    pad_k = tl.load(pad + C + head * HD + d, mask=in_d, other=0.0)
    pad_v = tl.load(pad + 2 * C + head * HD + d, mask=in_d, other=0.0)
    sum_ds = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    sum_k = tl.zeros((BLOCK_D,), tl.float32)
    sum_v = tl.zeros((BLOCK_D,), tl.float32)
    windows = B * ((H + WIN - 1) // WIN) * ((W + WIN - 1) // WIN)
    for window in range(chunk, windows, tl.num_programs(0) // HEADS):
        start, real, full = _window(window, n, H, W, WIN)
        start, real_q, full = _window(window, m, H, W, WIN)
        source = qkv + start * (3 * C) + head * HD
        target = grad_qkv + start * (3 * C) + head * HD
        mask = real_q[:, None] & in_d[None, :]
        q = tl.load(source + at_q, mask=mask, other=0.0)
        k = _load(source + at_k, real, in_d, pad_k, PAD_MASK)
        v = _load(source + at_k + C, real, in_d, pad_v, PAD_MASK)
        do = tl.load(
            grad + start * C + head * HD + at_m[:, None] * C + d[None, :], mask=mask, other=0.0
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        if PAD_MASK:
            s = tl.where(real[None, :], s, float('-inf'))
        largest = tl.max(s, 1)
        p = tl.exp2(s - largest[:, None])
        total = tl.sum(p, 1)
        p = p / total[:, None]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        delta = tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None])
        if HAS_BIAS:
            sum_ds += ds
        low = ds.to(q.dtype)
        dq = tl.dot(low, k, input_precision=PRECISION) * scale
        tl.store(target + at_q, dq.to(grad_qkv.dtype.element_ty), mask=mask)
        if WHOLE:
            dk = tl.dot(tl.trans(low), q, input_precision=PRECISION) * scale
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
            mask = real[:, None] & in_d[None, :]
            tl.store(target + at_k, dk.to(grad_qkv.dtype.element_ty), mask=mask)
            tl.store(target + at_k + C, dv.to(grad_qkv.dtype.element_ty), mask=mask)
            if not PAD_MASK:
                if not full:  # else there is nothing to add: most windows
                    sum_k += tl.sum(tl.where(real[:, None], 0.0, dk), 0)
                    sum_v += tl.sum(tl.where(real[:, None], 0.0, dv), 0)
        else:
            place = stats + head * (B.to(tl.int64) * H * W) + start + at_m
            tl.store(place, largest + tl.log2(total), mask=real_q)
            tl.store(place + HEADS * (B.to(tl.int64) * H * W), delta, mask=real_q)
    if HAS_BIAS:
        place = part_bias + (chunk * HEADS + head) * N * N + m[:, None] * N + n[None, :]
        tl.store(place, sum_ds, mask=(m < N)[:, None] & (n < N)[None, :])
    if WHOLE:
        if not PAD_MASK:
            place = part_pad + chunk * 2 * C + head * HD + d
            tl.store(place, sum_k, mask=in_d)
            tl.store(place + C, sum_v, mask=in_d)


@triton.jit(do_not_specialize=SIZES)
def _grad_keys(
    qkv, pad, table, grad, grad_qkv, part_pad, stats, B, H, W, scale,
    HEADS: tl.constexpr, HD: tl.constexpr, WIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    PAD_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values from all queries, after :func:`_grad_queries`.

    ``part_pad`` (chunks * blocks, 2, C) is for those of padded tokens.
    """
    C: tl.constexpr = HEADS * HD
    head, chunk = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_d = d < HD
    at_m = m // WIN * W + m % WIN
    at_k = (n // WIN * W + n % WIN)[:, None] * (3 * C) + C + d[None, :]
    bias = _bias(table, m[None, :], n[:, None], head, HEADS, WIN, HAS_BIAS)  # (keys, queries)
    pad_k = tl.load(pad + C + head * HD + d, mask=in_d, other=0.0)
    pad_v = tl.load(pad + 2 * C + head * HD + d, mask=in_d, other=0.0)
    sum_k = tl.zeros((BLOCK_D,), tl.float32)
    sum_v = tl.zeros((BLOCK_D,), tl.float32)
    windows = B * ((H + WIN - 1) // WIN) * ((W + WIN - 1) // WIN)
    for window in range(chunk, windows, tl.num_programs(0) // HEADS):
        start, real, full = _window(window, n, H, W, WIN)
        start, real_q, full = _window(window, m, H, W, WIN)
        source = qkv + start * (3 * C) + head * HD
        target = grad_qkv + start * (3 * C) + head * HD
        mask = real_q[:, None] & in_d[None, :]
        q = tl.load(source + at_m[:, None] * (3 * C) + d[None, :], mask=mask, other=0.0)
        do = tl.load(
            grad + start * C + head * HD + at_m[:, None] * C + d[None, :], mask=mask, other=0.0
        )
        k = _load(source + at_k, real, in_d, pad_k, PAD_MASK)
        v = _load(source + at_k + C, real, in_d, pad_v, PAD_MASK)
        place = stats + head * (B.to(tl.int64) * H * W) + start + at_m
        log = tl.load(place, mask=real_q, other=0.0)
        delta = tl.load(place + HEADS * (B.to(tl.int64) * H * W), mask=real_q, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) + bias
        p = tl.exp2(s - log[None, :])
        if PAD_MASK:
            p = tl.where(real[:, None], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, input_precision=PRECISION) * scale
        mask = real[:, None] & in_d[None, :]
        tl.store(target + at_k, dk.to(grad_qkv.dtype.element_ty), mask=mask)
        tl.store(target + at_k + C, dv.to(grad_qkv.dtype.element_ty), mask=mask)
        if not PAD_MASK:
            if not full:
                sum_k += tl.sum(tl.where(real[:, None], 0.0, dk), 0)
                sum_v += tl.sum(tl.where(real[:, None], 0.0, dv), 0)
    if not PAD_MASK:
        place = part_pad + (chunk * tl.num_programs(1) + tl.program_id(1)) * 2 * C + head * HD + d
        tl.store(place, sum_k, mask=in_d)
        tl.store(place + C, sum_v, mask=in_d)


@triton.jit(do_not_specialize=['chunks', 'rows'])
def _reduce(
    part_bias, part_pad, grad_table, grad_pad, chunks, rows,
    HEADS: tl.constexpr, HD: tl.constexpr, WIN: tl.constexpr, ENTRIES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add partial sums, always in the same order: a program an entry of the table, or some of pad.

    The first ENTRIES * HEADS programs add those of ``part_bias`` (chunks, HEADS, N, N) over all
    pairs of tokens that share an entry, the others those of ``part_pad`` (rows, 2, C).
    """
    N: tl.constexpr = WIN * WIN
    C: tl.constexpr = HEADS * HD
    program = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    if program < ENTRIES * HEADS:
        entry, head = program // HEADS, program % HEADS
        y = n // WIN + entry // (2 * WIN - 1) - WIN + 1
        x = n % WIN + entry % (2 * WIN - 1) - WIN + 1
        pair = (n < N) & (y >= 0) & (y < WIN) & (x >= 0) & (x < WIN)
        place = part_bias + head * N * N + (y * WIN + x) * N + n
        for first in range(0, chunks, BLOCK_R):
            mask = (first + r < chunks)[:, None] & pair[None, :]
            at = (first + r)[:, None] * (HEADS * N * N)
            total += tl.load(place[None, :] + at, mask=mask, other=0.0)
        one = tl.sum(tl.sum(total, 0), 0)
        tl.store(grad_table + program, one.to(grad_table.dtype.element_ty))
    else:
        c = (program - ENTRIES * HEADS) * BLOCK_N + n
        for first in range(0, rows, BLOCK_R):
            mask = (first + r < rows)[:, None] & (c < 2 * C)[None, :]
            at = (first + r)[:, None] * (2 * C) + c[None, :]
            total += tl.load(part_pad + at, mask=mask, other=0.0)
        tl.store(
            grad_pad + C + c, tl.sum(total, 0).to(grad_pad.dtype.element_ty), mask=c < 2 * C
        )


def _constants(qkv: Tensor, table: Tensor | None, heads: int, window: int, pad_mask: bool) -> dict:
    """What the kernels on maps are compiled for."""
    head_dim = qkv.shape[-1] // 3 // heads
    return dict(
        HEADS=heads,
        HD=head_dim,
        WIN=window,
        HAS_BIAS=table is not None,
        PAD_MASK=pad_mask,
        BLOCK_N=_block(window**2),
        BLOCK_D=_block(head_dim),
        PRECISION='tf32x3' if qkv.dtype == torch.float32 else 'tf32',
    )


def _block(size: int) -> int:
    """The power of two that holds a size, no smaller than what ``tl.dot`` takes."""
    return max(16, triton.next_power_of_2(size))


def _windows(qkv: Tensor, window: int) -> int:
    B, H, W, _ = qkv.shape
    return B * window_count(H, window) * window_count(W, window)


def _grid(windows: int, heads: int, window: int, options: dict) -> tuple[tuple[int, int], dict]:
    """Turn an entry of the tables at the top into a grid and launch options."""
    options = dict(options)
    block = options['BLOCK'] = options.pop('block') or _block(window**2)
    blocks = triton.cdiv(window**2, block)
    programs = options.pop('programs', None)
    per = options.pop('per', 1)
    if programs:
        per = triton.cdiv(windows, max(1, programs // (heads * blocks)))
    return (triton.cdiv(windows, per) * heads, blocks), options


def _operator(name: str):
    """Registration as an operator; the interpreter's kernels cannot be traced into."""
    interpreted = isinstance(_forward, InterpretedFunction)
    register = torch.library.custom_op if interpreted else torch.library.triton_op
    return register(f'mmhrformer::{name}', mutates_args=())


@_operator('window_attention')
def _window_attention(
    qkv: Tensor,
    pad: Tensor,
    table: Tensor | None,
    heads: int,
    window: int,
    scale: float,
    pad_mask: bool,
) -> Tensor:
    qkv, pad = qkv.contiguous(), pad.contiguous()
    table = None if table is None else table.contiguous()
    B, H, W, C3 = qkv.shape
    out = qkv.new_empty(B, H, W, C3 // 3)
    constants = _constants(qkv, table, heads, window, pad_mask)
    options = FORWARD[constants['BLOCK_N'] <= SMALL]
    grid, options = _grid(_windows(qkv, window), heads, window, options)
    with torch.cuda.device_of(qkv):
        wrap_triton(_forward)[grid](
            qkv, pad, pad if table is None else table, out, B, H, W, scale, **constants, **options
        )
    return out


@_window_attention.register_fake
def _(qkv, pad, table, heads, window, scale, pad_mask):
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)


@_operator('window_attention_backward')
def _window_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    pad: Tensor,
    table: Tensor | None,
    heads: int,
    window: int,
    scale: float,
    pad_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, qkv, pad = grad.contiguous(), qkv.contiguous(), pad.contiguous()
    table = pad.new_empty(0) if table is None else table.contiguous()
    has_bias = table.numel() > 0
    B, H, W, C3 = qkv.shape
    sizes = (B, H, W, scale)
    constants = _constants(qkv, table if has_bias else None, heads, window, pad_mask)
    small = constants['BLOCK_N'] <= SMALL
    windows, N = _windows(qkv, window), window**2
    grid, options = _grid(windows, heads, window, QUERIES[small])
    chunks = grid[0] // heads
    grad_qkv, grad_table = torch.empty_like(qkv), torch.empty_like(table)
    grad_pad = torch.zeros_like(pad)  # queries of padded tokens are of no use
    empty = lambda *size: qkv.new_empty(size, dtype=torch.float32)  # noqa: E731
    part_bias = empty(chunks, heads, N, N) if has_bias else empty(1)
    stats = empty(1) if small else empty(2, heads, B, H, W)
    if not small:
        grid_keys, options_keys = _grid(windows, heads, window, KEYS[small])
    rows = chunks if small else grid_keys[0] // heads * grid_keys[1]
    part_pad = empty(1) if pad_mask else empty(rows, 2, C3 // 3)
    with torch.cuda.device_of(qkv):
        wrap_triton(_grad_queries)[grid](
            qkv, pad, table, grad, grad_qkv, part_bias, part_pad, stats, *sizes,
            WHOLE=small, **constants, **options,
        )  # fmt: skip
        if not small:
            wrap_triton(_grad_keys)[grid_keys](
                qkv, pad, table, grad, grad_qkv, part_pad, stats, *sizes,
                **constants, **options_keys,
            )  # fmt: skip
        entries = (2 * window - 1) ** 2 if has_bias else 0
        block = constants['BLOCK_N']
        programs = entries * heads + (0 if pad_mask else triton.cdiv(2 * C3 // 3, block))
        if programs:
            wrap_triton(_reduce)[(programs,)](
                part_bias, part_pad, grad_table, grad_pad, chunks, rows,
                HEADS=heads, HD=constants['HD'], WIN=window, ENTRIES=entries,
                BLOCK_N=block, BLOCK_R=4096 // block,
            )  # fmt: skip
    return grad_qkv, grad_pad, grad_table


@_window_attention_backward.register_fake
def _(grad, qkv, pad, table, heads, window, scale, pad_mask):
    table = pad.new_empty(0) if table is None else table
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (qkv, pad, table))


def _save(ctx, inputs, output):
    qkv, pad, table, *ctx.options = inputs
    ctx.save_for_backward(qkv, pad, table)


def _differentiate(ctx, grad):
    qkv, pad, table = ctx.saved_tensors
    grads = _window_attention_backward(grad, qkv, pad, table, *ctx.options)
    return *grads[:2], None if table is None else grads[2], None, None, None, None


_window_attention.register_autograd(_differentiate, setup_context=_save)


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

    Gradients of ``qkv``, ``pad`` and ``table`` are the same bits each time. Logits, softmax and
    sums are in float32; products of float32 numbers are made of three of TF32's, which loses
    nothing that matters.

    Args:
        qkv (Tensor): Queries, keys and values of the tokens of a map, not padded, of shape
            (B, H, W, 3 * num_heads * head_dim): float32, float16 or bfloat16.
        pad (Tensor): What padded tokens have instead, of shape (3 * num_heads * head_dim,): the
            bias of the projection. Of any data type.
        table (Tensor, optional): Relative position biases of shape
            ((2 * window - 1)^2, num_heads), of any data type. None: no biases.
        num_heads (int): Heads.
        window (int): Side of the square windows, in tokens, centred on the map.
        scale (float): What to multiply products of queries and keys with.
        pad_mask (bool): Whether padded tokens are hidden from the others. Defaults to False.

    Returns:
        Tensor: Weighted sums of the values, of shape (B, H, W, num_heads * head_dim), of qkv's
        data type.

    Raises:
        ValueError: If shapes do not fit.

    Examples:
        >>> import torch
        >>> from mmhrformer.ops.triton_attention import window_attention
        >>> qkv = torch.rand(2, 8, 6, 96, device='cuda')
        >>> pad, table = torch.zeros(96, device='cuda'), torch.zeros(169, 2, device='cuda')
        >>> window_attention(qkv, pad, table, num_heads=2, window=7, scale=0.25).shape
        torch.Size([2, 8, 6, 32])
    """
    C3 = qkv.shape[-1]
    if qkv.dim() != 4 or C3 % (3 * num_heads):
        raise ValueError(
            f'qkv has shape {tuple(qkv.shape)}: give a map (B, H, W, 3 * {num_heads} * head_dim)'
        )
    if pad.shape != (C3,):
        raise ValueError(f'pad has shape {tuple(pad.shape)}: give one number a channel, ({C3},)')
    if table is not None and table.shape != ((2 * window - 1) ** 2, num_heads):
        raise ValueError(
            f'table has shape {tuple(table.shape)}: window={window} and num_heads={num_heads} '
            f'make ({(2 * window - 1) ** 2}, {num_heads})'
        )
    return _window_attention(qkv, pad, table, num_heads, window, scale, pad_mask)

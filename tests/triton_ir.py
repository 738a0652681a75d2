"""Triton kernels on CPU tensors: the compiler's intermediate representation, executed with NumPy.

Triton's own interpreter runs the Python source instead. It misses what the compiler makes of the
source, knows no data types of numbers, and neither multiplies bfloat16 nor rounds to it. Here,
memory is checked as well: kernels access nothing outside their tensors, and what a mask excludes
from a load is NaN unless the load says otherwise.

Programs run one after the other. Products of float32 must be of full precision.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

Array = np.ndarray
TARGET = GPUTarget('cuda', 90, 32)
# Arrays of bfloat16 are float32, rounded after each operation.
ARRAYS = dict(
    f64=np.float64, f32=np.float32, f16=np.float16, bf16=np.float32,
    i1=np.bool_, i8=np.int8, i16=np.int16, i32=np.int32, i64=np.int64,
)  # fmt: skip
MEMORY = {**ARRAYS, 'bf16': np.uint16}


# ----------------------------------------------------------------------------------------- parsing


@dataclass(frozen=True)
class Type:
    """Type of a number, a pointer, or a tensor of these."""

    shape: tuple[int, ...]
    element: str  # of a pointer, what it points to
    is_pointer: bool

    @cached_property
    def array(self) -> np.dtype:
        return np.dtype(np.int64 if self.is_pointer else ARRAYS[self.element])

    def make(self, value: Array | float) -> Array:
        """A value as an array of this type, rounded if it is of bfloat16."""
        value = np.asarray(value, self.array)
        is_rounded = self.element == 'bf16' and not self.is_pointer
        return from_bfloat16(to_bfloat16(value)) if is_rounded else value


TYPE = r'tensor<(?:[^<>]|<[^<>]*>)*>|!tt\.ptr<\w+>|\b(?:bf16|[fi]\d+)\b'


@cache
def parse_type(text: str) -> Type:
    *shape, element = text.replace('!tt.ptr<', '').removeprefix('tensor<').rstrip('>').split('x')
    return Type(tuple(map(int, shape)), element, 'ptr' in text)


@dataclass
class Block:
    """Operations in their order, the arguments of the block, and the line that ends it."""

    arguments: list[str] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    end: str = ''


class Operation:
    """A line such as ``%x = arith.addi %a, %b : tensor<8xi32>``, and the blocks below it."""

    def __init__(self, line: str, lines: Iterator[str]) -> None:
        results, name, self.text = re.match(r'(?:(%.*?) = )?"?([\w.]+)"?(.*)', line).groups()
        self.name = name.removeprefix('arith.').removeprefix('math.')
        self.blocks: list[Block] = []
        while line.endswith('{'):
            self.blocks.append(parse_block(lines))
            line = self.blocks[-1].end
        self.results: list[str] = []
        for name, _, count in (part.partition(':') for part in (results or '').split(', ')):
            self.results += [f'{name}#{i}' for i in range(int(count))] if count else [name]
        operands, _, types = self.text.rpartition(' : ')
        self.operands = re.findall(r'%[\w#-]+', operands or self.text)
        self.types = [parse_type(text) for text in re.findall(TYPE, types)]
        # The arguments of a loop and their first values.
        self.carried = re.findall(r'(%[\w-]+) = (%[\w#-]+)', self.text)

    def number(self, attribute: str) -> int:
        return int(re.search(rf'\b{attribute} = (-?\d+)', self.text)[1])


def parse_block(lines: Iterator[str]) -> Block:
    """The operations up to the end of a block."""
    block = Block()
    for line in lines:
        if line.startswith('}'):
            block.end = line
            break
        if line.startswith('^'):
            block.arguments = re.findall(r'(%[\w-]+):', line)
        else:
            block.operations.append(Operation(line, lines))
    return block


def parse(module: str) -> tuple[list[tuple[str, Type]], Block]:
    """Parameters and operations of the function in a module."""
    lines = (line.strip() for line in module.splitlines())
    head = next(line for line in lines if line.startswith('tt.func'))
    parameters = re.findall(rf'(%\w+): ({TYPE})', head)
    return [(name, parse_type(text)) for name, text in parameters], parse_block(lines)


# --------------------------------------------------------------------------------------- operations


def to_bfloat16(x: Array) -> Array:
    """The bits of float32 numbers, rounded to the nearest bfloat16, to the even one of two."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def unsigned(function: Callable) -> Callable:
    """A function of the unsigned numbers with the same bits."""

    def call(*values: Array) -> Array:
        return function(*(value.view(f'u{value.itemsize}') for value in values))

    return call


def divide(a: Array, b: Array) -> Array:
    """Integers, rounded toward zero."""
    return (a - np.fmod(a, b)) // b


# Functions of the values, by name without dialect; casts only change the type.
ELEMENTWISE = dict(
    addi=np.add, subi=np.subtract, muli=np.multiply, divsi=divide, remsi=np.fmod,
    minsi=np.minimum, maxsi=np.maximum, shli=np.left_shift, shrsi=np.right_shift,
    andi=np.bitwise_and, ori=np.bitwise_or, xori=np.bitwise_xor,
    divui=unsigned(np.floor_divide), remui=unsigned(np.remainder), shrui=unsigned(np.right_shift),
    addf=np.add, subf=np.subtract, mulf=np.multiply, divf=np.divide, negf=np.negative,
    maximumf=np.maximum, minimumf=np.minimum, maxnumf=np.fmax, minnumf=np.fmin,
    absf=np.abs, exp2=np.exp2, log2=np.log2, sqrt=np.sqrt, rsqrt=lambda x: 1 / np.sqrt(x),
    select=np.where, sitofp=np.asarray, fptosi=np.asarray, extf=np.asarray, truncf=np.asarray,
    extsi=lambda x: -x.view(np.int8) if x.dtype == bool else x,
    extui=lambda x: x if x.dtype == bool else x.view(f'u{x.itemsize}'),
)  # fmt: skip
COMPARISONS = dict(
    eq=np.equal, ne=np.not_equal, lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal
)


@cache
def constant(op: Operation) -> Array:
    """A number, or a tensor full of it; infinities are written as bits."""
    kind, text = op.types[-1], re.search(r'([^< ]+?)>? : ', op.text)[1]
    if text.startswith('0x'):
        bits = np.array(int(text, 16), f'u{np.dtype(MEMORY[kind.element]).itemsize}')
        value = from_bfloat16(bits) if kind.element == 'bf16' else bits.view(kind.array)
    else:
        value = text == 'true' if kind.element == 'i1' else float(text)
    return kind.make(np.full(kind.shape, value))


def bitcast(op: Operation, x: Array) -> Array:
    before, after = op.types
    bits = to_bfloat16(x) if before.element == 'bf16' else x
    return from_bfloat16(bits) if after.element == 'bf16' else bits.view(after.array)


def dot(op: Operation, a: Array, b: Array, c: Array) -> Array:
    assert op.types[0].element != 'f32' or 'tf32x3' in op.text, 'rounds to TF32'
    return c + a.astype(np.float32) @ b.astype(np.float32)


# Functions of the operation and its values, whose results have the last of its types.
FUNCTIONS = {
    'constant': constant,
    'trunci': lambda op, x: x & 1 if op.types[-1].element == 'i1' else x,
    'tt.bitcast': bitcast,
    'tt.dot': dot,
    'tt.make_range': lambda op: np.arange(op.number('start'), op.number('end')),
    'tt.splat': lambda op, x: np.full(op.types[-1].shape, x),
    'tt.broadcast': lambda op, x: np.broadcast_to(x, op.types[-1].shape),
    'tt.expand_dims': lambda op, x: np.expand_dims(x, op.number('axis')),
    'tt.reshape': lambda op, x: x.reshape(op.types[-1].shape),
    'tt.trans': lambda op, x: x.transpose(
        [int(axis) for axis in re.search(r'i32: (.*?)>', op.text)[1].split(',')]
    ),
}


class Program:
    """One program of a launch.

    Args:
        values (dict): Parameters of the kernel, to which the results of its operations are added.
        memory (list): For each tensor its address, and its bytes.
        grid (tuple[int, int, int]): Numbers of programs.
        index (tuple[int, int, int]): Which of them this is.
    """

    def __init__(self, values: dict, memory: list, grid: tuple, index: tuple) -> None:
        self.values, self.memory, self.grid, self.index = values, memory, grid, index

    def run(self, block: Block, *arguments: Array) -> list[Array]:
        """Execute a block; return the operands of its last operation."""
        self.values.update(zip(block.arguments, arguments))
        results: list[Array] = []
        for op in block.operations:
            try:
                results = self.execute(op, *map(self.values.get, op.operands))
            except Exception as err:
                err.add_note(f'in {op.name}{op.text}')
                raise
            self.values.update(zip(op.results, results))
        return results

    def execute(self, op: Operation, *values: Array | None) -> list[Array]:
        if op.name in ELEMENTWISE:
            return [op.types[-1].make(ELEMENTWISE[op.name](*values))]
        if op.name in FUNCTIONS:
            return [op.types[-1].make(FUNCTIONS[op.name](op, *values))]
        return METHODS[op.name](self, op, *values)

    def compare(self, op: Operation, a: Array, b: Array) -> list[Array]:
        name = op.text[1 : op.text.index(',')]
        function = COMPARISONS[name[-2:]]
        if a.dtype.kind == 'f':
            assert name == 'une' or name[0] == 'o' != name[1:2], 'unknown results for NaN'
        elif name[0] == 'u':
            function = unsigned(function)
        return [function(a, b)]

    def get_program_id(self, op: Operation) -> list[Array]:
        return [np.array(self.index['xyz'.index(op.text[1])], np.int32)]

    def get_num_programs(self, op: Operation) -> list[Array]:
        return [np.array(self.grid['xyz'.index(op.text[1])], np.int32)]

    def leave(self, op: Operation, *values: Array) -> list[Array]:
        return list(values)

    # ------------------------------------------------------------------------------------- memory

    def add_pointer(self, op: Operation, pointers: Array, n: Array) -> list[Array]:
        itemsize = np.dtype(MEMORY[op.types[0].element]).itemsize
        return [pointers + n.astype(np.int64) * itemsize]

    def elements(
        self, element: str, pointers: Array, mask: Array | bool
    ) -> Iterator[tuple[Array, Array, Array]]:
        """For each tensor that is pointed to: its numbers, by which pointers, their indices."""
        kind = np.dtype(MEMORY[element])
        left = np.full(pointers.shape, mask)
        for address, data in self.memory:
            steps = pointers - address
            here = left & (steps >= 0) & (steps < data.size)
            if here.any():
                assert not (steps[here] % kind.itemsize).any(), 'between two numbers'
                yield data.view(kind), here, steps[here] // kind.itemsize
                left &= ~here
        assert not left.any(), f'{left.sum()} of {left.size} addresses are in no tensor'

    def load(
        self, op: Operation, pointers: Array, mask: Array | bool = True, other=None
    ) -> list[Array]:
        element, kind = op.types[0].element, ARRAYS[op.types[0].element]
        if other is None:
            other = np.nan if issubclass(kind, np.floating) else -1
        loaded = np.full(pointers.shape, other, kind)
        for numbers, here, indices in self.elements(element, pointers, mask):
            found = numbers[indices]
            loaded[here] = from_bfloat16(found) if element == 'bf16' else found
        return [loaded]

    def store(
        self, op: Operation, pointers: Array, values: Array, mask: Array | bool = True
    ) -> list[Array]:
        element = op.types[0].element
        values = to_bfloat16(values) if element == 'bf16' else values
        for numbers, here, indices in self.elements(element, pointers, mask):
            numbers[indices] = values[here]
        return []

    def atomic_add(self, op: Operation, pointers: Array, values: Array, mask: Array) -> list[Array]:
        assert op.text.startswith(' fadd'), 'only additions are known'
        for numbers, here, indices in self.elements(op.types[1].element, pointers, mask):
            np.add.at(numbers, indices, values[here])
        return []  # what was there before, which no kernel uses

    # ------------------------------------------------------------------------------- control flow

    def branch(self, op: Operation, condition: Array) -> list[Array]:
        blocks = op.blocks if condition else op.blocks[1:]
        return self.run(blocks[0]) if blocks else []

    def loop(self, op: Operation, _, start, end, step, *__) -> list[Array]:
        (index, _), *carried = op.carried
        (body,) = op.blocks
        body.arguments = [index, *(name for name, _ in carried)]
        values = [self.values[name] for _, name in carried]
        for i in range(start, end, step):
            values = self.run(body, np.array(i, start.dtype), *values)
        return values

    def while_loop(self, op: Operation, *_) -> list[Array]:
        before, after = op.blocks
        before.arguments = [name for name, _ in op.carried]
        values = [self.values[name] for _, name in op.carried]
        while True:
            proceed, *values = self.run(before, *values)
            if not proceed:
                return values
            values = self.run(after, *values)

    def reduce(self, op: Operation, *values: Array) -> list[Array]:
        """Combine the two halves until one row is left; their lengths are powers of two."""
        values = [np.moveaxis(value, op.number('axis'), 0) for value in values]
        while (half := len(values[0]) // 2) > 0:
            first, second = [x[:half] for x in values], [x[half:] for x in values]
            values = self.run(op.blocks[0], *first, *second)
        return [value[0] for value in values]


METHODS = {
    'cmpi': Program.compare,
    'cmpf': Program.compare,
    'tt.get_program_id': Program.get_program_id,
    'tt.get_num_programs': Program.get_num_programs,
    'tt.addptr': Program.add_pointer,
    'tt.load': Program.load,
    'tt.store': Program.store,
    'tt.atomic_rmw': Program.atomic_add,
    'tt.reduce': Program.reduce,
    'tt.reduce.return': Program.leave,
    'tt.return': Program.leave,
    'ttg.barrier': Program.leave,
    'gpu.barrier': Program.leave,
    'scf.if': Program.branch,
    'scf.for': Program.loop,
    'scf.while': Program.while_loop,
    'scf.condition': Program.leave,
    'scf.yield': Program.leave,
}


# ----------------------------------------------------------------------------------------- launches


def to_ir(kernel: JITFunction, arguments: dict, kinds: list, options: dict) -> tuple:
    """The parameters of a compiled kernel: their names, and as :func:`parse` returns them."""
    backend = make_backend(TARGET)
    packed = kernel._pack_args(backend, options, arguments, kinds, options)
    options, signature, *_ = packed
    source = ASTSource(kernel, *packed[1:])
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(TARGET, options, functions, modules, context)
    stages = {}
    backend.add_stages(stages, options, source.language)
    text = stages['ttir'](module, {}).str_nodebug()
    return [name for name, kind in signature.items() if kind != 'constexpr'], *parse(text)


def bytes_of(tensor: Tensor) -> Array:
    """The memory of a tensor, from its first to its last number."""
    steps = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    count = (steps + 1) * tensor.element_size() if tensor.numel() else 0
    start = tensor.storage_offset() * tensor.element_size()
    data = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return data[start : start + count].numpy()


def execute(grid: tuple, arguments: dict, compiled: tuple) -> None:
    """Execute the programs of a launch, one after the other."""
    names, parameters, body = compiled
    values = [arguments[name] for name in names]
    tensors = [value for value in values if isinstance(value, Tensor)]
    memory = [(tensor.data_ptr(), bytes_of(tensor)) for tensor in tensors]
    numbers = {
        name: kind.make(value.data_ptr() if kind.is_pointer else value)
        for value, (name, kind) in zip(values, parameters)
    }
    with np.errstate(all='ignore'):
        for index in np.ndindex(*grid):
            Program(dict(numbers), memory, grid, index).run(body)


def install() -> None:
    """Let kernels run in this way where their tensors are on the CPU."""
    assert not knobs.runtime.interpret, 'unset TRITON_INTERPRET, by which kernels do not compile'
    knobs.runtime.interpret = False  # whatever the variable says later
    run, compiled = JITFunction.run, {}

    def run_on_cpu(self: JITFunction, *args, grid, warmup, **options):
        if not any(isinstance(arg, Tensor) and arg.device.type == 'cpu' for arg in args):
            return run(self, *args, grid=grid, warmup=warmup, **options)
        bind = create_function_from_signature(self.signature, self.params, make_backend(TARGET))
        arguments, kinds, _ = bind(*args, **options)
        key = self, str(kinds), str(options)
        if key not in compiled:
            compiled[key] = to_ir(self, arguments, kinds, options)
        execute(grid, arguments, compiled[key])

    JITFunction.run = run_on_cpu

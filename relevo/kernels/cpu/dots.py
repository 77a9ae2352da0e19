"""The innermost loop of matrix products: a tile of dot products between rows of weights and rows of x.

Both lie in memory row by row, so lanes run along k, and a tile of `width` rows of weights by `rows` rows of x keeps
width * rows accumulators in registers. However large the tile, each dot product adds the same numbers in the same
order, so that a row of the output does not depend on what else is in the batch, bit for bit.

k goes in steps of 16, each of two halves. The even and the odd values of a bfloat16 step are cheap to widen and its
first and last eight are not, so its halves are those, and x and widened weights are laid down in that order, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # ships no types
from numba import types

from relevo.kernels.cpu.jit import intrinsic
from relevo.kernels.cpu.simd import BFLOAT16, FLOAT16, FLOAT32, LANES, operation, vector

STEP = 16
AHEAD = 2  # so many tiles before it is multiplied, a row of weights is asked for; of float32 one tile before
INT8 = 3  # an element type beside those of `simd`
ELEMENT_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, INT8: 1}

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VF32, _VI32 = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_ZERO = ir.Constant(_VF32, [0.0] * LANES)


def dot_tile(width: int, rows: int, element: int) -> Callable[[int, int, int, int, int, int, int], None]:
    """Compiled code that adds a tile of dot products to sums.

    Takes (weights, offset, x, x_stride, count, sums, sums_stride):
    weights: address of (1 + AHEAD) * width addresses, of this tile's rows of `element` and of those to ask memory for;
             what is meant begins `offset` bytes after them
    x:       address of `rows` rows of float32, x_stride bytes apart
    count:   values in each row, a multiple of STEP and not zero
    sums:    address of `rows` rows of `width` float32, sums_stride bytes apart; whatever makes a row of them a multiple
             of 16 bytes is read, and written as it was
    """
    signature = types.void(*[types.int64] * 7)

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        weights, offset, x, x_stride, count, sums, sums_stride = values

        def row_of_weights(index: int) -> Any:
            return builder.add(_load(builder, builder.add(weights, _I64(8 * index)), _I64), offset)

        weight_rows = [row_of_weights(i) for i in range(width)]
        ahead = width * (1 if element == FLOAT32 else AHEAD)
        rows_ahead = [row_of_weights(ahead + i) for i in range(width)]
        x_rows = [builder.add(x, builder.mul(x_stride, _I64(i))) for i in range(rows)]
        dots = _dots(builder, weight_rows, rows_ahead, x_rows, count, element)
        _add_sums(builder, dots, width, [builder.add(sums, builder.mul(sums_stride, _I64(i))) for i in range(rows)])
        return context.get_dummy_value()

    def tile(_context: Any, weights: Any, offset: Any, x: Any, stride: Any, count: Any, sums: Any, step: Any) -> Any:
        return signature, generate

    return intrinsic(tile)


def widened_half(half: int, element: int) -> Callable[[int], Any]:
    """Compiled code that reads half a step at an address as a vector."""
    return operation(vector, lambda builder, at: _widened_half(builder, at, half, element), types.int64)


def halves_of_pairs(half: int) -> Callable[[Any, Any], Any]:
    """Compiled code that takes the even (0) or the odd (1) values of the sixteen in two vectors."""
    lanes = list(range(half, 2 * LANES, 2))
    return operation(vector, lambda builder, x, y: _shuffled(builder, x, y, lanes), vector, vector)


def _dots(
    builder: Any, weight_rows: list[Any], rows_ahead: list[Any], x_rows: list[Any], count: Any, element: int
) -> list[Any]:
    """Vectors of partial sums, [rows][width] in one list."""
    before, loop, after = builder.block, builder.append_basic_block("dots"), builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(_I64)
    sums = [builder.phi(_VF32) for _ in range(len(weight_rows) * len(x_rows))]
    weights_at = [builder.add(row, builder.mul(at, _I64(ELEMENT_BYTES[element]))) for row in weight_rows]
    x_at = [builder.add(row, builder.mul(at, _I64(4))) for row in x_rows]
    results: list[Any] = list(sums)
    for row in rows_ahead:
        _prefetch(builder, builder.add(row, builder.mul(at, _I64(ELEMENT_BYTES[element]))))
    for half in range(2):
        _add_products(builder, results, weights_at, x_at, half, element)
    following = builder.add(at, _I64(STEP))
    at.add_incoming(_I64(0), before)
    at.add_incoming(following, loop)
    for phi, result in zip(sums, results, strict=True):
        phi.add_incoming(_ZERO, before)
        phi.add_incoming(result, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return results


def _add_products(
    builder: Any, sums: list[Any], weights_at: list[Any], x_at: list[Any], half: int, element: int
) -> None:
    """sums += one half of a step; the smaller side stays in registers while the larger passes by."""
    _barrier(builder)
    if len(weights_at) < len(x_at):
        held = [_widened_half(builder, at, half, element) for at in weights_at]
        passing, passing_element = x_at, FLOAT32
    else:
        held = [_widened_half(builder, at, half, FLOAT32) for at in x_at]
        passing, passing_element = weights_at, element
    for i, at in enumerate(passing):
        value = _widened_half(builder, at, half, passing_element)
        for j, other in enumerate(held):
            dot = i * len(held) + j if passing is x_at else j * len(passing) + i
            sums[dot] = _fma(builder, value, other, sums[dot])


def _widened_half(builder: Any, at: Any, half: int, element: int) -> Any:
    """Half a step as float32: of bfloat16 the even or the odd values, otherwise the first or the last eight."""
    if element == BFLOAT16:
        pairs = _load(builder, at, _VI32)
        wide = builder.and_(pairs, _constant(-65536)) if half else builder.shl(pairs, _constant(16))
        return builder.bitcast(wide, _VF32)
    at = builder.add(at, _I64(half * LANES * ELEMENT_BYTES[element]))
    if element == FLOAT16:
        return builder.fpext(_load(builder, at, ir.VectorType(ir.HalfType(), LANES)), _VF32)
    if element == INT8:
        narrow = _load(builder, at, ir.VectorType(ir.IntType(8), LANES))
        return builder.sitofp(builder.sext(narrow, _VI32), _VF32)
    return _load(builder, at, _VF32)


def _add_sums(builder: Any, dots: list[Any], width: int, rows_at: list[Any]) -> None:
    """Sum each dot product's lanes, always as ((0+1)+(2+3)) + ((4+5)+(6+7)), and add the sums to those in memory."""
    padded = -(-width // 4) * 4
    vectors = []
    for i in range(len(rows_at)):
        vectors += dots[i * width : (i + 1) * width] + [_ZERO] * (padded - width)
    vectors += [_ZERO] * (-len(vectors) % LANES)
    eights = [_lane_sums(builder, vectors[i : i + LANES]) for i in range(0, len(vectors), LANES)]
    for i, at in enumerate(rows_at):
        eight, first = eights[i * padded // LANES], i * padded % LANES
        row = _shuffled(builder, eight, eight, list(range(first, first + padded)))
        stored = builder.store(builder.fadd(_load(builder, at, row.type), row), _pointer(builder, at, row.type))
        stored.align = 4


def _lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """The sums of eight vectors' lanes, in order."""
    for low, high in (([0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]),) * 2 + (
        ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
    ):
        couples = [vectors[i : i + 2] for i in range(0, len(vectors), 2)]
        vectors = [builder.fadd(_shuffled(builder, x, y, low), _shuffled(builder, x, y, high)) for x, y in couples]
    return vectors[0]


def _shuffled(builder: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _pointer(builder: Any, address: Any, pointee: Any) -> Any:
    return builder.inttoptr(address, pointee.as_pointer())


def _load(builder: Any, address: Any, pointee: Any) -> Any:
    loaded = builder.load(_pointer(builder, address, pointee))
    loaded.align = 1
    return loaded


def _barrier(builder: Any) -> None:
    """Loads do not move across, and so neither need more registers than there are; it is no instruction itself."""
    builder.call(ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", True), [])


def _prefetch(builder: Any, address: Any) -> None:
    byte_pointer = ir.IntType(8).as_pointer()
    function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, _I32, _I32, _I32])
    name = "llvm.prefetch.p0i8"
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    builder.call(function, [builder.inttoptr(address, byte_pointer), _I32(0), _I32(3), _I32(1)])


def _constant(value: int) -> Any:
    return ir.Constant(_VI32, [value] * LANES)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    name = f"llvm.fma.v{LANES}f32"
    function_type = ir.FunctionType(_VF32, [_VF32] * 3)
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, [x, y, z])

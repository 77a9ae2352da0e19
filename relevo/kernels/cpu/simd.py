"""Vectors of eight float32 for compiled code, and loads and stores at plain addresses.

LLVM does not find the register blocking that attention wants in loops over arrays, so the kernels say it: a
`Vector` is one AVX register (two NEON ones), and `fma(a, b, c)` is one instruction. An address is an int64 in
bytes, so that one compiled function serves every dtype, stride and rank. Nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]  # ships no types
from numba import types
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import register_model

from relevo.kernels.cpu.jit import intrinsic, jit

LANES = 8
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # element types of the caller's tensors
ELEMENTS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VF32, _VI16, _VI32 = (ir.VectorType(lane, LANES) for lane in (_F32, _I16, _I32))
_VF16 = ir.VectorType(ir.HalfType(), LANES)


class VectorType(types.Type):
    """Eight float32 in a register."""

    def __init__(self) -> None:
        super().__init__(name="float32x8")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _VF32)  # type: ignore[no-untyped-call]  # numba's


def operation(result: Any, emit: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """A compiled function of up to three arguments whose body is what `emit(builder, *values)` builds."""
    signature = result(*arguments)

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        emitted = emit(builder, *values)
        return context.get_dummy_value() if result == types.void else emitted

    def of_one(typing_context: Any, a: Any) -> Any:
        return signature, generate

    def of_two(typing_context: Any, a: Any, b: Any) -> Any:
        return signature, generate

    def of_three(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
        return signature, generate

    return intrinsic((of_one, of_two, of_three)[len(arguments) - 1])


def _pointer(builder: Any, address: Any, pointee: Any) -> Any:
    return builder.inttoptr(address, pointee.as_pointer())


def _load(builder: Any, address: Any, pointee: Any) -> Any:
    loaded = builder.load(_pointer(builder, address, pointee))
    loaded.align = 4 if pointee in (_VF32, _F32, _I32) else 2
    return loaded


def _store(builder: Any, address: Any, value: Any) -> None:
    stored = builder.store(value, _pointer(builder, address, value.type))
    stored.align = 4 if value.type in (_VF32, _F32, _I64) else 2


def _call(builder: Any, name: str, *values: Any) -> Any:
    kind = values[0].type
    suffix = "f32" if kind == _F32 else f"v{LANES}f32"
    function_type = ir.FunctionType(kind, [value.type for value in values])
    function = builder.module.globals.get(f"{name}.{suffix}") or ir.Function(
        builder.module, function_type, f"{name}.{suffix}"
    )
    return builder.call(function, values)


def _splat(builder: Any, scalar: Any) -> Any:
    lane_zero = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined), scalar, _I32(0))
    mask = ir.Constant(_VI32, [0] * LANES)
    return builder.shuffle_vector(lane_zero, ir.Constant(lane_zero.type, ir.Undefined), mask)


def _constant(value: float, lane: Any = _F32) -> Any:
    return ir.Constant(ir.VectorType(lane, LANES), [value] * LANES)


def from_bfloat16(builder: Any, bits: Any, wide: Any, result: Any) -> Any:
    """int16, or eight of them, to float32 by way of int32."""
    shifted = builder.shl(builder.zext(bits, wide), _constant(16, _I32) if wide == _VI32 else _I32(16))
    return builder.bitcast(shifted, result)


def bits_of_bfloat16(builder: Any, value: Any) -> Any:
    """Eight float32 to int16, to nearest, ties to even, as torch does; a NaN stays one because these are quiet."""
    bits = builder.bitcast(value, _VI32)
    odd = builder.and_(builder.lshr(bits, _constant(16, _I32)), _constant(1, _I32))
    rounded = builder.add(bits, builder.add(odd, _constant(0x7FFF, _I32)))
    return builder.trunc(builder.lshr(rounded, _constant(16, _I32)), _VI16)


def _exp(builder: Any, x: Any) -> Any:
    """Cephes' expf, without its table: relative error under 2e-7, and exactly 0 below -87."""
    vanishes = builder.fcmp_ordered("<", x, _constant(-87.0))
    x = builder.select(vanishes, _constant(-87.0), x)
    exponent = _call(builder, "llvm.rint", builder.fmul(x, _constant(1.44269504088896341)))
    # x = exponent * ln 2 + rest, ln 2 in two parts so that the difference is exact
    rest = _call(builder, "llvm.fma", exponent, _constant(-0.693359375), x)
    rest = _call(builder, "llvm.fma", exponent, _constant(2.12194440e-4), rest)
    series = _constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        series = _call(builder, "llvm.fma", series, rest, _constant(coefficient))
    biased = builder.add(builder.fptosi(exponent, _VI32), _constant(127, _I32))
    power = builder.bitcast(builder.shl(biased, _constant(23, _I32)), _VF32)
    return builder.select(vanishes, _constant(0.0), builder.fmul(series, power))


def _tanh(builder: Any, x: Any) -> Any:
    """(1 - e^-2|x|) / (1 + e^-2|x|) with x's sign: absolute error under 3e-7, which is what logits need."""
    one = _constant(1.0)
    shrunk = _exp(builder, builder.fmul(_call(builder, "llvm.fabs", x), _constant(-2.0)))
    return _call(builder, "llvm.copysign", builder.fdiv(builder.fsub(one, shrunk), builder.fadd(one, shrunk)), x)


def _shuffled_sum(builder: Any, x: Any, y: Any, first: list[int], second: list[int]) -> Any:
    shuffles = (builder.shuffle_vector(x, y, ir.Constant(_VI32, lanes)) for lanes in (first, second))
    return builder.fadd(*shuffles)


def _add_pairs(builder: Any, x: Any, y: Any) -> Any:
    """(x0+x1, x2+x3, y0+y1, y2+y3, x4+x5, …), which AVX shuffles within 128 bits. Twice, of four: sums of fours."""
    return _shuffled_sum(builder, x, y, [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15])


def _add_halves(builder: Any, x: Any, y: Any) -> Any:
    """(x0+x4, x1+x5, x2+x6, x3+x7, y0+y4, …): after two `add_pairs`, the sums of eight vectors' lanes, in order."""
    return _shuffled_sum(builder, x, y, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])


def _largest_lane(builder: Any, x: Any) -> Any:
    name = f"llvm.vector.reduce.fmax.v{LANES}f32"
    function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(_F32, [_VF32]), name)
    return builder.call(function, [x])


def _any_reached(builder: Any, x: Any, y: Any) -> Any:
    lanes = builder.bitcast(builder.fcmp_ordered(">=", x, y), ir.IntType(LANES))
    return builder.icmp_unsigned("!=", lanes, ir.IntType(LANES)(0))


def _is_within(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return builder.and_(builder.fcmp_ordered(">=", x, y), builder.fcmp_ordered("<", x, z))


def _within(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return builder.select(_is_within(builder, x, y, z), x, _constant(0.0))


def _any_within(builder: Any, x: Any, y: Any, z: Any) -> Any:
    lanes = builder.bitcast(_is_within(builder, x, y, z), ir.IntType(LANES))
    return builder.icmp_unsigned("!=", lanes, ir.IntType(LANES)(0))


_address, _float, _int = types.int64, types.float32, types.int64

# Vectors: arithmetic.
splat = operation(vector, _splat, _float)
fma = operation(vector, lambda b, x, y, z: _call(b, "llvm.fma", x, y, z), vector, vector, vector)
add = operation(vector, lambda b, x, y: b.fadd(x, y), vector, vector)
subtract = operation(vector, lambda b, x, y: b.fsub(x, y), vector, vector)
multiply = operation(vector, lambda b, x, y: b.fmul(x, y), vector, vector)
divide = operation(vector, lambda b, x, y: b.fdiv(x, y), vector, vector)
absolute = operation(vector, lambda b, x: _call(b, "llvm.fabs", x), vector)
where_positive = operation(
    vector, lambda b, x, y, z: b.select(b.fcmp_ordered(">", x, _constant(0.0)), y, z), vector, vector, vector
)
maximum = operation(vector, lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y), vector, vector)
exp = operation(vector, _exp, vector)
tanh = operation(vector, _tanh, vector)
# z where x >= y, or x > y, else 0
where_reached = operation(
    vector, lambda b, x, y, z: b.select(b.fcmp_ordered(">=", x, y), z, _constant(0.0)), vector, vector, vector
)
where_exceeded = operation(
    vector, lambda b, x, y, z: b.select(b.fcmp_ordered(">", x, y), z, _constant(0.0)), vector, vector, vector
)
any_reached = operation(types.boolean, _any_reached, vector, vector)  # x >= y in any lane
within = operation(vector, _within, vector, vector, vector)  # x where y <= x < z, else 0
any_within = operation(types.boolean, _any_within, vector, vector, vector)
largest_lane = operation(_float, _largest_lane, vector)

add_pairs = operation(vector, _add_pairs, vector, vector)
add_halves = operation(vector, _add_halves, vector, vector)
first_lane = operation(_float, lambda b, x: b.extract_element(x, _I32(0)), vector)

# Vectors: memory.
load = operation(vector, lambda b, at: _load(b, at, _VF32), _address)
load_bfloat16 = operation(vector, lambda b, at: from_bfloat16(b, _load(b, at, _VI16), _VI32, _VF32), _address)
load_float16 = operation(vector, lambda b, at: b.fpext(_load(b, at, _VF16), _VF32), _address)
store = operation(types.void, _store, _address, vector)
store_bfloat16 = operation(types.void, lambda b, at, x: _store(b, at, bits_of_bfloat16(b, x)), _address, vector)
store_float16 = operation(types.void, lambda b, at, x: _store(b, at, b.fptrunc(x, _VF16)), _address, vector)
broadcast = operation(vector, lambda b, at: _splat(b, _load(b, at, _F32)), _address)

# Scalars.
load_float = operation(_float, lambda b, at: _load(b, at, _F32), _address)
store_float = operation(types.void, _store, _address, _float)
load_int32 = operation(_int, lambda b, at: b.sext(_load(b, at, _I32), _I64), _address)
load_int64 = operation(_int, lambda b, at: _load(b, at, _I64), _address)
store_int64 = operation(types.void, _store, _address, types.int64)
float_of = operation(_float, lambda b, bits: b.fptrunc(b.bitcast(bits, ir.DoubleType()), _F32), types.int64)
load_double = operation(types.float64, lambda b, at: _load(b, at, ir.DoubleType()), _address)
store_double = operation(types.void, _store, _address, types.float64)
double_of = operation(types.float64, lambda b, bits: b.bitcast(bits, ir.DoubleType()), types.int64)
float_of_bits = operation(_float, lambda b, bits: b.bitcast(b.trunc(bits, _I32), _F32), types.int64)
_load_bfloat16_scalar = operation(_float, lambda b, at: from_bfloat16(b, _load(b, at, _I16), _I32, _F32), _address)
_load_float16_scalar = operation(_float, lambda b, at: b.fpext(_load(b, at, ir.HalfType()), _F32), _address)


def _prefetch(builder: Any, address: Any) -> None:
    byte_pointer = ir.IntType(8).as_pointer()
    function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, _I32, _I32, _I32])
    name = "llvm.prefetch.p0i8"
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    builder.call(function, [builder.inttoptr(address, byte_pointer), _I32(0), _I32(3), _I32(1)])


def _copy(builder: Any, target: Any, source: Any, num_bytes: Any) -> None:
    byte_pointer = ir.IntType(8).as_pointer()
    function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, byte_pointer, _I64, ir.IntType(1)])
    name = "llvm.memcpy.p0i8.p0i8.i64"
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    pointers = [builder.inttoptr(target, byte_pointer), builder.inttoptr(source, byte_pointer)]
    builder.call(function, [*pointers, num_bytes, ir.IntType(1)(0)])


def record(fields: type[tuple[Any, ...]]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Functions to load a NamedTuple of int64 from an address, and to store one there: load(at), store(at, value)."""
    count = len(fields._fields)  # type: ignore[attr-defined]  # a NamedTuple's
    kind = types.NamedUniTuple(types.int64, count, fields)  # type: ignore[no-untyped-call]  # numba's

    def emit_load(builder: Any, address: Any) -> Any:
        value = builder.load(_pointer(builder, address, ir.ArrayType(_I64, count)))
        value.align = 8
        return value

    def emit_store(builder: Any, address: Any, value: Any) -> None:
        builder.store(value, _pointer(builder, address, value.type)).align = 8

    return operation(kind, emit_load, _address), operation(types.void, emit_store, _address, kind)


prefetch = operation(types.void, _prefetch, _address)
copy_bytes = operation(types.void, _copy, _address, _address, types.int64)
# Adds to an int64 that several threads count with, and returns what it was before.
fetch_add = operation(
    types.int64, lambda b, at, n: b.atomic_rmw("add", _pointer(b, at, _I64), n, "seq_cst"), _address, types.int64
)


@jit
def widen_rows(
    target: int, target_stride: int, source: int, source_stride: int, rows: int, count: int, element: int
) -> None:
    """Read rows of `count` elements of any supported type and write them as float32, zero up to the next row."""
    whole = count - count % LANES
    for _ in range(rows):
        if element == BFLOAT16:
            for i in range(0, whole, LANES):
                store(target + 4 * i, load_bfloat16(source + 2 * i))
            for i in range(whole, count):
                store_float(target + 4 * i, _load_bfloat16_scalar(source + 2 * i))
        elif element == FLOAT16:
            for i in range(0, whole, LANES):
                store(target + 4 * i, load_float16(source + 2 * i))
            for i in range(whole, count):
                store_float(target + 4 * i, _load_float16_scalar(source + 2 * i))
        else:
            for i in range(0, whole, LANES):
                store(target + 4 * i, load(source + 4 * i))
            for i in range(whole, count):
                store_float(target + 4 * i, load_float(source + 4 * i))
        for i in range(count, target_stride // 4):
            store_float(target + 4 * i, 0.0)
        target += target_stride
        source += source_stride


@jit
def narrow(target: int, source: int, count: int, element: int, scratch: int) -> None:
    """Write `count` float32 as elements of any supported type; `source` is readable to a whole vector's end."""
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        if element == BFLOAT16:
            store_bfloat16(target + 2 * i, load(source + 4 * i))
        elif element == FLOAT16:
            store_float16(target + 2 * i, load(source + 4 * i))
        else:
            store(target + 4 * i, load(source + 4 * i))
    if whole < count:
        rest = load(source + 4 * whole)
        if element == BFLOAT16:
            store_bfloat16(scratch, rest)
        elif element == FLOAT16:
            store_float16(scratch, rest)
        else:
            store(scratch, rest)
        size = 4 if element == FLOAT32 else 2
        copy_bytes(target + size * whole, scratch, size * (count - whole))

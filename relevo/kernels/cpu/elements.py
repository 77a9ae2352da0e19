"""Vectors of a tensor's elements, whatever their type: loads widen to float32, stores round once.

Which type it is, is known at run time only: the branch goes the same way for a whole call, which costs next to nothing.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # ships no types
from numba import types

from relevo.kernels.cpu.jit import jit
from relevo.kernels.cpu.simd import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LANES,
    add_halves,
    add_pairs,
    bits_of_bfloat16,
    first_lane,
    from_bfloat16,
    load,
    load_bfloat16,
    load_float16,
    operation,
    store,
    store_bfloat16,
    store_float16,
    vector,
)

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_WORDS16, _WORDS32 = ir.VectorType(_I16, LANES), ir.VectorType(_I32, LANES)
_HALVES, _FLOATS = ir.VectorType(ir.HalfType(), LANES), ir.VectorType(ir.FloatType(), LANES)


def _first(builder: Any, count: Any) -> Any:
    """A mask of the first `count` lanes."""
    limit = builder.insert_element(ir.Constant(_WORDS32, ir.Undefined), builder.trunc(count, _I32), _I32(0))
    limit = builder.shuffle_vector(limit, limit, ir.Constant(_WORDS32, [0] * LANES))
    return builder.icmp_signed("<", ir.Constant(_WORDS32, list(range(LANES))), limit)


def _masked(builder: Any, kind: str, words: Any, result: Any, *values: Any) -> Any:
    """llvm.masked.load or .store, which touch no byte of a lane that is masked."""
    element = f"v{LANES}i{words.element.width}"
    name = f"llvm.masked.{kind}.{element}.p0{element}"
    function_type = ir.FunctionType(result, [value.type for value in values])
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, values)


def _load_part(builder: Any, address: Any, count: Any, words: Any) -> Any:
    pointer = builder.inttoptr(address, words.as_pointer())
    zero = ir.Constant(words, [0] * LANES)
    alignment = _I32(words.element.width // 8)
    return _masked(builder, "load", words, words, pointer, alignment, _first(builder, count), zero)


def _store_part(builder: Any, address: Any, value: Any, count: Any) -> None:
    words = value.type
    pointer = builder.inttoptr(address, words.as_pointer())
    alignment = _I32(words.element.width // 8)
    _masked(builder, "store", words, ir.VoidType(), value, pointer, alignment, _first(builder, count))


_load_part_float32 = operation(
    vector, lambda b, at, n: b.bitcast(_load_part(b, at, n, _WORDS32), _FLOATS), types.int64, types.int64
)
_load_part_bfloat16 = operation(
    vector,
    lambda b, at, n: from_bfloat16(b, _load_part(b, at, n, _WORDS16), _WORDS32, _FLOATS),
    types.int64,
    types.int64,
)
_load_part_float16 = operation(
    vector,
    lambda b, at, n: b.fpext(b.bitcast(_load_part(b, at, n, _WORDS16), _HALVES), _FLOATS),
    types.int64,
    types.int64,
)
_store_part_float32 = operation(
    types.void, lambda b, at, x, n: _store_part(b, at, b.bitcast(x, _WORDS32), n), types.int64, vector, types.int64
)
_store_part_bfloat16 = operation(
    types.void, lambda b, at, x, n: _store_part(b, at, bits_of_bfloat16(b, x), n), types.int64, vector, types.int64
)
_store_part_float16 = operation(
    types.void,
    lambda b, at, x, n: _store_part(b, at, b.bitcast(b.fptrunc(x, _HALVES), _WORDS16), n),
    types.int64,
    vector,
    types.int64,
)


@jit
def element_size(element: int) -> int:
    """In bytes."""
    return 4 if element == FLOAT32 else 2


@jit
def load_elements(line: int, i: int, element: int) -> Any:
    """Elements [i, i + 8) of the line at an address."""
    if element == BFLOAT16:
        return load_bfloat16(line + 2 * i)
    if element == FLOAT16:
        return load_float16(line + 2 * i)
    return load(line + 4 * i)


@jit
def load_part(line: int, i: int, count: int, element: int) -> Any:
    """Elements [i, i + count), count < 8, zero in the other lanes; nothing past them is read."""
    if element == BFLOAT16:
        return _load_part_bfloat16(line + 2 * i, count)
    if element == FLOAT16:
        return _load_part_float16(line + 2 * i, count)
    return _load_part_float32(line + 4 * i, count)


@jit
def store_elements(line: int, i: int, values: Any, element: int) -> None:
    """The other way round."""
    if element == BFLOAT16:
        store_bfloat16(line + 2 * i, values)
    elif element == FLOAT16:
        store_float16(line + 2 * i, values)
    else:
        store(line + 4 * i, values)


@jit
def store_part(line: int, i: int, values: Any, count: int, element: int) -> None:
    """Only the first `count` lanes; nothing past them is written."""
    if element == BFLOAT16:
        _store_part_bfloat16(line + 2 * i, values, count)
    elif element == FLOAT16:
        _store_part_float16(line + 2 * i, values, count)
    else:
        _store_part_float32(line + 4 * i, values, count)


@jit
def sum_of_lanes(values: Any) -> float:
    """Added pairwise."""
    halves = add_halves(values, values)
    pairs = add_pairs(halves, halves)
    total: float = first_lane(add_pairs(pairs, pairs))
    return total

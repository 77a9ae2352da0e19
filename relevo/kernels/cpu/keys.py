"""Logits as whole numbers of the same order, and a heap of the largest.

A logit's key is its float32 bits, those below the sign turned over for negative numbers: keys compare as int32 just as
the logits do, with NaN above all and -0 equal to 0. A candidate is a key and a token id in one int64, so that of equal
logits the lower id is the larger candidate and no two candidates are equal.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # ships no types
from numba import types

from relevo.kernels.cpu.jit import jit
from relevo.kernels.cpu.simd import LANES, load, load_int64, operation, store_int64, vector

NAN_KEY = 0x7FFFFFFF
LOWEST_KEY = -(1 << 31)  # below that of -inf
BLOCK = 64  # logits whose largest is found first; only blocks that can matter are looked into

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


def _key(builder: Any, logit: Any) -> Any:
    """int32, or eight of them."""
    kind = _I32 if logit.type == _F32 else _WORDS

    def constant(value: float, lane: Any) -> Any:
        return lane(value) if logit.type == _F32 else ir.Constant(ir.VectorType(lane, LANES), [value] * LANES)

    bits = builder.bitcast(builder.fadd(logit, constant(0.0, _F32)), kind)  # -0 + 0 is 0
    flipped = builder.and_(builder.ashr(bits, constant(31, _I32)), constant(NAN_KEY, _I32))
    return builder.select(
        builder.fcmp_unordered("uno", logit, logit), constant(NAN_KEY, _I32), builder.xor(bits, flipped)
    )


def _load_key(builder: Any, address: Any) -> Any:
    logit = builder.load(builder.inttoptr(address, _F32.as_pointer()))
    logit.align = 4
    return builder.sext(_key(builder, logit), _I64)


def _maximum(builder: Any, x: Any, y: Any) -> Any:
    x, y = builder.bitcast(x, _WORDS), builder.bitcast(y, _WORDS)
    return builder.bitcast(builder.select(builder.icmp_signed(">", x, y), x, y), _FLOATS)


def _largest(builder: Any, keys: Any) -> Any:
    name = f"llvm.vector.reduce.smax.v{LANES}i32"
    function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(_I32, [_WORDS]), name)
    return builder.sext(builder.call(function, [builder.bitcast(keys, _WORDS)]), _I64)


load_key = operation(types.int64, _load_key, types.int64)
# Eight int32 keys, in the registers of eight float32.
keys_of = operation(vector, lambda b, x: b.bitcast(_key(b, x), _FLOATS), vector)
maximum_keys = operation(vector, _maximum, vector, vector)
largest_key = operation(types.int64, _largest, vector)


@jit
def block_key(logits: int, count: int) -> int:
    """The largest key of `count` logits, up to BLOCK of them."""
    if count == BLOCK:
        largest = keys_of(load(logits))
        for at in range(4 * LANES, 4 * BLOCK, 4 * LANES):
            largest = maximum_keys(keys_of(load(logits + at)), largest)
        key: int = largest_key(largest)
        return key
    key = LOWEST_KEY
    for i in range(count):
        key = max(key, load_key(logits + 4 * i))
    return key


@jit
def candidate(key: int, token_id: int) -> int:
    return (key << 32) + (0xFFFFFFFF - token_id)


@jit
def token_of(candidate: int) -> int:
    return 0xFFFFFFFF - (candidate & 0xFFFFFFFF)


@jit
def offer(heap: int, size: int, capacity: int, value: int) -> int:
    """Keep the largest `capacity` int64 of all that are offered; returns how many there are now.

    heap: the address of [capacity] int64, each no larger than those at twice its index and one or two more
    """
    if size < capacity:
        at = size
        while at > 0:
            parent = (at - 1) // 2
            above = load_int64(heap + 8 * parent)
            if above <= value:
                break
            store_int64(heap + 8 * at, above)
            at = parent
        store_int64(heap + 8 * at, value)
        return size + 1
    if value > load_int64(heap):
        sift_down(heap, size, value)
    return size


@jit
def sift_down(heap: int, size: int, value: int) -> None:
    """Put a value in the place of the smallest."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        below = load_int64(heap + 8 * child)
        if child + 1 < size:
            other = load_int64(heap + 8 * child + 8)
            if other < below:
                child, below = child + 1, other
        if below >= value:
            break
        store_int64(heap + 8 * at, below)
        at = child
    store_int64(heap + 8 * at, value)


@jit
def pop_smallest(heap: int, size: int) -> int:
    """The smallest of `size`; the others are a heap again."""
    smallest: int = load_int64(heap)
    if size > 1:
        sift_down(heap, size - 1, load_int64(heap + 8 * (size - 1)))
    return smallest

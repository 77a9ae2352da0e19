"""Rows of any element type, laid down as float32 in the order of `dots`."""

from __future__ import annotations

from typing import Any

from relevo.kernels.cpu.dots import INT8, STEP, halves_of_pairs, widened_half
from relevo.kernels.cpu.jit import jit
from relevo.kernels.cpu.simd import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    copy_bytes,
    load,
    load_bfloat16,
    load_float16,
    splat,
    store,
)

_even_bfloat16, _odd_bfloat16 = widened_half(0, BFLOAT16), widened_half(1, BFLOAT16)
_load_int8 = widened_half(0, INT8)
_evens, _odds = halves_of_pairs(0), halves_of_pairs(1)


@jit
def widen(target: int, source: int, count: int, element: int, paired: bool, line: int) -> None:
    """Write `count` values as float32 in whole steps, zero past the last value.

    paired: the eight even values of each step before the eight odd ones
    line:   64 bytes to use
    """
    size = 4 if element == FLOAT32 else (1 if element == INT8 else 2)
    whole = count - count % STEP
    _widen_steps(target, source, whole, element, paired)
    if whole < count:
        store(line, splat(0.0))
        store(line + 32, splat(0.0))
        copy_bytes(line, source + whole * size, (count - whole) * size)
        _widen_steps(target + 4 * whole, line, STEP, element, paired)


@jit
def _widen_steps(target: int, source: int, count: int, element: int, paired: bool) -> None:
    if element == BFLOAT16:
        if paired:
            for i in range(0, count, STEP):
                store(target + 4 * i, _even_bfloat16(source + 2 * i))
                store(target + 4 * i + 32, _odd_bfloat16(source + 2 * i))
        else:
            for i in range(0, count, 8):
                store(target + 4 * i, load_bfloat16(source + 2 * i))
    elif element == INT8:
        for i in range(0, count, 8):
            store(target + 4 * i, _load_int8(source + i))
    elif element == FLOAT16:
        for i in range(0, count, STEP):
            _store_halves(target + 4 * i, load_float16(source + 2 * i), load_float16(source + 2 * i + 16), paired)
    else:
        for i in range(0, count, STEP):
            _store_halves(target + 4 * i, load(source + 4 * i), load(source + 4 * i + 32), paired)


@jit
def _store_halves(target: int, first: Any, last: Any, paired: bool) -> None:
    if paired:
        store(target, _evens(first, last))
        store(target + 32, _odds(first, last))
    else:
        store(target, first)
        store(target + 32, last)

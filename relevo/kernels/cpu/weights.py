"""Probabilities of a row as whole numbers, and their sums: `relevo.kernels.sampling` in compiled code.

A row of probabilities is float32, padded with zeros to whole blocks of 64. Sums are float64 of whole numbers below
2**53: exact, in any order.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # ships no types
from numba import types

from relevo.kernels.cpu.elements import sum_of_lanes
from relevo.kernels.cpu.jit import jit
from relevo.kernels.cpu.keys import BLOCK
from relevo.kernels.cpu.simd import (
    LANES,
    add,
    copy_bytes,
    divide,
    exp,
    largest_lane,
    load,
    load_float,
    maximum,
    operation,
    splat,
    store,
    subtract,
    where_reached,
)
from relevo.kernels.sampling import PROBABILITY_UNITS

LOWEST = -math.inf

_F32, _F64, _I32 = ir.FloatType(), ir.DoubleType(), ir.IntType(32)
_FLOATS, _DOUBLES = ir.VectorType(_F32, LANES), ir.VectorType(_F64, LANES)


def _block_weight(builder: Any, address: Any, least: Any) -> Any:
    """The sum of floor(p * units) over a block's p >= least."""
    function_type = ir.FunctionType(_DOUBLES, [_DOUBLES])
    name = f"llvm.floor.v{LANES}f64"
    floor = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    low = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), least, _I32(0))
    low = builder.shuffle_vector(low, low, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))
    units = ir.Constant(_DOUBLES, [PROBABILITY_UNITS] * LANES)
    total = ir.Constant(_DOUBLES, [0.0] * LANES)
    for at in range(0, 4 * BLOCK, 4 * LANES):
        pointer = builder.inttoptr(builder.add(address, address.type(at)), _FLOATS.as_pointer())
        p = builder.load(pointer)
        p.align = 4
        kept = builder.select(builder.fcmp_ordered(">=", p, low), p, ir.Constant(_FLOATS, [0.0] * LANES))
        total = builder.fadd(total, builder.call(floor, [builder.fmul(builder.fpext(kept, _DOUBLES), units)]))
    lanes = [builder.extract_element(total, _I32(lane)) for lane in range(LANES)]
    while len(lanes) > 1:
        lanes = [builder.fadd(lanes[i], lanes[i + 1]) for i in range(0, len(lanes), 2)]
    return lanes[0]


block_weight = operation(types.float64, _block_weight, types.int64, types.float32)


@jit
def weight_of(p: float) -> float:
    """One probability as a whole number."""
    return math.floor(p * PROBABILITY_UNITS) * 1.0


@jit
def largest_logit(logits: int, vocab: int) -> float:
    """None is NaN."""
    whole = vocab - vocab % (4 * LANES)
    m0 = m1 = m2 = m3 = splat(LOWEST)
    for i in range(0, 4 * whole, 16 * LANES):
        m0, m1 = maximum(load(logits + i), m0), maximum(load(logits + i + 4 * LANES), m1)
        m2, m3 = maximum(load(logits + i + 8 * LANES), m2), maximum(load(logits + i + 12 * LANES), m3)
    for i in range(whole, vocab):
        m0 = maximum(splat(load_float(logits + 4 * i)), m0)
    largest: float = largest_lane(maximum(maximum(m0, m1), maximum(m2, m3)))
    return largest


@jit
def exponentials(target: int, logits: int, vocab: int, temperature: float, largest: float, least: float) -> float:
    """exp(logit / temperature - largest) to a padded row, 0 where logit / temperature < least; returns the sum of all.

    largest: of logit / temperature
    """
    total = 0.0
    for first in range(0, vocab, BLOCK):
        source, out = logits + 4 * first, target + 4 * first
        if vocab - first < BLOCK:
            for i in range(0, BLOCK, LANES):
                store(out + 4 * i, splat(LOWEST))
            copy_bytes(out, source, 4 * (vocab - first))
            source = out
        total += _exponentials_of_block(out, source, splat(temperature), splat(largest), splat(least))
    return total


@jit
def _exponentials_of_block(out: int, source: int, temperature: Any, largest: Any, least: Any) -> float:
    total = splat(0.0)
    for i in range(0, 4 * BLOCK, 4 * LANES):
        scaled = divide(load(source + i), temperature)
        weight = exp(subtract(scaled, largest))
        total = add(total, weight)
        store(out + i, where_reached(scaled, least, weight))
    return sum_of_lanes(total)


@jit
def normalize(row: int, vocab: int, total: float) -> None:
    """Divide a padded row by a number."""
    divisor = splat(total)
    for i in range(0, 4 * ((vocab + BLOCK - 1) // BLOCK) * BLOCK, 4 * LANES):
        store(row + i, divide(load(row + i), divisor))

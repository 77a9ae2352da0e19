"""From weighted values to output: putting an item's parts together, dividing by the sums, writing it down."""

from __future__ import annotations

from relevo.kernels.cpu.buffers import Result, padded, result_at
from relevo.kernels.cpu.jit import jit
from relevo.kernels.cpu.records import Item, Problem
from relevo.kernels.cpu.simd import (
    FLOAT32,
    exp,
    first_lane,
    fma,
    load,
    load_float,
    maximum,
    multiply,
    narrow,
    splat,
    store,
    store_float,
    subtract,
)


@jit
def merge(problem: Problem, item: Item, first: int, size: int) -> None:
    """Add up the item's partial results, `size` bytes apart, into the first of them."""
    rows = item.tokens * (problem.heads // problem.kv_heads)
    v_pad = padded(problem.v_dim)
    into = result_at(problem, first)
    for split in range(1, item.splits):
        part = result_at(problem, first + split * size)
        for row in range(rows):
            at = 4 * row
            mine, theirs = splat(load_float(into.maxima + at)), splat(load_float(part.maxima + at))
            highest = maximum(mine, theirs)
            mine, theirs = exp(subtract(mine, highest)), exp(subtract(theirs, highest))
            total = multiply(mine, splat(load_float(into.sums + at)))
            total = fma(theirs, splat(load_float(part.sums + at)), total)
            store_float(into.maxima + at, first_lane(highest))
            store_float(into.sums + at, first_lane(total))
            for d in range(0, 4 * v_pad, 32):
                line = into.output + at * v_pad + d
                added = multiply(theirs, load(part.output + at * v_pad + d))
                store(line, fma(mine, load(line), added))


@jit
def write(problem: Problem, item: Item, result: Result, line: int) -> None:
    """Divide by the sums and write the item's rows to the output tensor, in the queries' type."""
    group = problem.heads // problem.kv_heads
    v_pad = padded(problem.v_dim)
    size = 4 if problem.query_element == FLOAT32 else 2
    for row in range(item.tokens * group):
        inverse = splat(1.0 / load_float(result.sums + 4 * row))
        source = result.output + 4 * row * v_pad
        for d in range(0, 4 * v_pad, 32):
            store(source + d, multiply(load(source + d), inverse))
        token = item.first + row // group
        head = item.kv_head * group + row % group
        target = problem.output + (token * problem.heads + head) * problem.v_dim * size
        narrow(target, source, problem.v_dim, problem.query_element, line)

"""The nucleus of a row: the fewest likeliest tokens that hold so much probability, of equals those with the lowest ids.

As in `relevo.kernels.sampling`: tokens go into buckets by the upper bits of their probability, and only the bucket
where the nucleus ends is put in order.
"""

from __future__ import annotations

from relevo.kernels.cpu.jit import jit
from relevo.kernels.cpu.keys import BLOCK, candidate, offer, pop_smallest, token_of
from relevo.kernels.cpu.simd import (
    LANES,
    any_reached,
    float_of_bits,
    load,
    load_double,
    load_float,
    load_int32,
    load_int64,
    splat,
    store_double,
    store_float,
)
from relevo.kernels.cpu.weights import weight_of
from relevo.kernels.sampling import BUCKET_SHIFT, NUM_BUCKETS

HISTOGRAM_BYTES = 8 * NUM_BUCKETS
HEAP_ENTRY = 8
# Of 152,000 tokens few are likelier than this, and they usually hold the nucleus: then the others need not be counted.
LIKELY = 2.0**-17
EXACT = 2.0**-26  # from here on, a probability is a whole number of units
SMALLEST = 2.0**-126


@jit
def keep_nucleus(row: int, blocks: int, lowest: float, wanted: float, histogram: int, heap: int) -> float:
    """Set to 0 the probabilities of the last bucket that are outside; returns below which the others are, too.

    row:    [blocks * 64] probabilities; those below `lowest` count as 0
    wanted: a whole number, at least 1 and at most the weight of all
    """
    size = BLOCK * blocks
    least = max(lowest, LIKELY)
    if _count_buckets(row, size, least, histogram) < wanted:
        least = max(lowest, SMALLEST)
        _count_buckets(row, size, least, histogram)
    bucket, held = NUM_BUCKETS - 1, load_double(histogram + 8 * (NUM_BUCKETS - 1))
    while held < wanted:
        bucket -= 1
        held += load_double(histogram + 8 * bucket)
    held -= load_double(histogram + 8 * bucket)
    bottom: float = max(float_of_bits(bucket << BUCKET_SHIFT), least)
    count = _gather(row, size, bottom, bucket, heap)
    while held < wanted:
        held += weight_of(load_float(row + 4 * token_of(-pop_smallest(heap, count))))
        count -= 1
    for i in range(count):
        store_float(row + 4 * token_of(-load_int64(heap + 8 * i)), 0.0)
    return bottom


@jit
def _count_buckets(row: int, size: int, least: float, histogram: int) -> float:
    """Weights by bucket of the probabilities not under `least`; returns their sum."""
    for bucket in range(NUM_BUCKETS):
        store_double(histogram + 8 * bucket, 0.0)
    total, low = 0.0, splat(least)
    for first in range(0, size, LANES):
        if any_reached(load(row + 4 * first), low):
            for i in range(first, first + LANES):
                p = load_float(row + 4 * i)
                if p >= least:
                    weight = weight_of(p)
                    total += weight
                    at = histogram + 8 * (load_int32(row + 4 * i) >> BUCKET_SHIFT)
                    store_double(at, load_double(at) + weight)
    return total


@jit
def _gather(row: int, size: int, bottom: float, bucket: int, heap: int) -> int:
    """The bucket's tokens to a heap, the likeliest at its top; returns how many there are."""
    count, low = 0, splat(bottom)
    for first in range(0, size, LANES):
        if any_reached(load(row + 4 * first), low):
            for i in range(first, first + LANES):
                p = load_float(row + 4 * i)
                if p >= bottom and load_int32(row + 4 * i) >> BUCKET_SHIFT == bucket:
                    order = load_int32(row + 4 * i)
                    if p < EXACT:
                        order = int(weight_of(p))
                    count = offer(heap, count, size, -candidate(order, i))
    return count

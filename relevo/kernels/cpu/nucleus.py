"""The nucleus of a row: the fewest likeliest tokens that hold so much probability, of equals those with the lowest ids.

As in `relevo.kernels.sampling`: tokens go into buckets by the upper bits of their probability. The bucket where the
nucleus ends is cut into as many parts of equal width, and only the part where it ends is put in order: of a flat
distribution a bucket may hold half the vocabulary.
"""

from __future__ import annotations

from relevo.kernels.cpu.jit import jit
from relevo.kernels.cpu.keys import BLOCK, candidate, offer, pop_smallest, token_of
from relevo.kernels.cpu.simd import (
    LANES,
    any_reached,
    any_within,
    float_of_bits,
    load,
    load_double,
    load_float,
    load_int32,
    load_int64,
    splat,
    store,
    store_double,
    store_float,
    within,
)
from relevo.kernels.cpu.weights import weight_of
from relevo.kernels.sampling import BUCKET_SHIFT, NUM_BUCKETS, PROBABILITY_UNITS

HISTOGRAM_BYTES = 8 * NUM_BUCKETS + 4 * LANES  # and one vector, for a look at its lanes
HEAP_ENTRY = 8
# Of 152,000 tokens few are likelier than this, and they usually hold the nucleus: then the others need not be counted.
LIKELY = 2.0**-17
EXACT = 2.0**-26  # from here on, a probability is a whole number of units
SMALLEST = 2.0**-126
ABOVE_ALL = 2.0


@jit
def keep_nucleus(row: int, blocks: int, lowest: float, wanted: float, histogram: int, heap: int) -> float:
    """Set to 0 what is outside though as likely as some inside; returns below which all others are outside.

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
    low, high = max(float_of_bits(bucket << BUCKET_SHIFT), least), float_of_bits((bucket + 1) << BUCKET_SHIFT)
    base = weight_of(low)
    scale = NUM_BUCKETS / (weight_of(high) - base + 1.0)
    _count_parts(row, size, low, high, base, scale, histogram)
    part = NUM_BUCKETS - 1
    while held + load_double(histogram + 8 * part) < wanted:
        held += load_double(histogram + 8 * part)
        part -= 1
    count = _gather(row, size, low, high, base, scale, part, heap)
    bottom = ABOVE_ALL
    while held < wanted:
        p = load_float(row + 4 * token_of(-pop_smallest(heap, count)))
        bottom = min(bottom, p)  # not always the last: below EXACT different ones weigh the same
        held += weight_of(p)
        count -= 1
    for i in range(count):
        store_float(row + 4 * token_of(-load_int64(heap + 8 * i)), 0.0)
    return bottom


@jit
def _count_buckets(row: int, size: int, least: float, histogram: int) -> float:
    """Weights by bucket of the probabilities not under `least`; returns their sum."""
    total, lanes = 0.0, histogram + 8 * NUM_BUCKETS
    for bucket in range(NUM_BUCKETS):
        store_double(histogram + 8 * bucket, 0.0)
    for first in range(0, 4 * size, 4 * LANES):
        if any_reached(load(row + first), splat(least)):
            # What does not count becomes 0 and counts nothing: cheaper than to jump over it.
            store(lanes, within(load(row + first), splat(least), splat(ABOVE_ALL)))
            for lane in range(lanes, lanes + 4 * LANES, 4):
                weight = weight_of(load_float(lane))
                total += weight
                at = histogram + 8 * (load_int32(lane) >> BUCKET_SHIFT)
                store_double(at, load_double(at) + weight)
    return total


@jit
def _count_parts(row: int, size: int, low: float, high: float, base: float, scale: float, histogram: int) -> None:
    """Weights of the bucket [low, high) by part. Parts are made of whole numbers, so that equal weights share one."""
    lanes = histogram + 8 * NUM_BUCKETS
    for part in range(NUM_BUCKETS):
        store_double(histogram + 8 * part, 0.0)
    for first in range(0, 4 * size, 4 * LANES):
        if any_within(load(row + first), splat(low), splat(high)):
            store(lanes, within(load(row + first), splat(low), splat(high)))
            for lane in range(lanes, lanes + 4 * LANES, 4):
                weight = weight_of(load_float(lane))
                at = histogram + 8 * int((max(weight, base) - base) * scale)
                store_double(at, load_double(at) + weight)


@jit
def _gather(row: int, size: int, low: float, high: float, base: float, scale: float, part: int, heap: int) -> int:
    """The part's tokens to a heap, the likeliest at its top; returns how many there are."""
    # A little more than the part, whose borders are in whole numbers; rounding down must not lose a float32.
    first_in = splat(max(low, (base + part / scale) / PROBABILITY_UNITS * (1.0 - 2.0**-20)))
    behind = splat(min(high, (base + (part + 1) / scale + 1.0) / PROBABILITY_UNITS * (1.0 + 2.0**-20)))
    count = 0
    for first in range(0, size, LANES):
        if any_within(load(row + 4 * first), first_in, behind):
            for i in range(first, first + LANES):
                p = load_float(row + 4 * i)
                weight = weight_of(p)
                if low <= p < high and int((weight - base) * scale) == part:
                    order = load_int32(row + 4 * i)
                    if p < EXACT:
                        order = int(weight)
                    count = offer(heap, count, size, -candidate(order, i))
    return count

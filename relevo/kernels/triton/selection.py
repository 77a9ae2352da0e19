"""Where top_k and top_p end, without a sort: a list of the tokens that may stay, then bisection over it."""

from __future__ import annotations

import triton
import triton.language as tl

from relevo.kernels.triton.probabilities import ID_BITS, key_of, probabilities, weights_of, weights_of_keys

PIVOTS = tl.constexpr(8)
ABOVE_ONE = tl.constexpr(0x3F800001)  # the bits after those of 1.0


@triton.jit(do_not_specialize=["rows", "num_groups"])
def list_kernel(
    logits, settings, largest, sums, groups, keys, counts, weights,
    row_stride, rows, vocab, num_groups, listed, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Append to keys [rows, listed] what may stay, in any order; add to counts how many, to weights what all weigh.

    What cannot stay, told without a sort. By top_k: what is under the least of `num_groups` groups' largest, if there
    are k groups. By top_p: vocab tokens of less than (1 - top_p) / vocab hold less than the nucleus may leave out; half
    of that is for roundings.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    min_p, top_k = tl.load(settings + rows + row), tl.load(settings + 2 * rows + row)
    top_p = tl.load(settings + 3 * rows + row)
    if (top_k > 0) | (top_p < 1.0):
        ids = split * CHUNK + tl.arange(0, CHUNK)
        scaled, probs = probabilities(
            logits, settings, largest, sums, row, tl.num_programs(1), ids, row_stride, rows, vocab, SPLITS
        )
        weight = weights_of(probs)
        stays = weight > 0
        tl.atomic_add(weights + row, tl.sum(weight, axis=0))
        if (top_k > 0) & (top_k <= num_groups):
            least = tl.full([SPLITS], float("inf"), tl.float32)
            for first in range(0, num_groups, SPLITS):
                group = first + tl.arange(0, SPLITS)
                part = tl.load(groups + row * num_groups + group, mask=group < num_groups, other=float("inf"))
                least = tl.minimum(least, part)
            stays &= scaled >= tl.min(least, axis=0)
        if (top_k <= 0) & (min_p <= 0):
            stays &= probs >= ((1.0 - top_p) * 0.5 / vocab).to(tl.float32)
        number = stays.to(tl.int32)
        place = tl.atomic_add(counts + row, tl.sum(number, axis=0).to(tl.int64)) + tl.cumsum(number, axis=0) - 1
        tl.store(keys + row * listed + place, key_of(probs, ids), mask=stays & (place < listed))


@triton.jit(do_not_specialize=["rows", "splits"])
def select_kernel(
    logits, settings, largest, sums, keys, counts, weights, lowest,
    row_stride, rows, vocab, splits, listed, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """lowest [rows]: the least key that stays, 0 where all do."""
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p = tl.load(settings + 2 * rows + row), tl.load(settings + 3 * rows + row)
    if (top_k > 0) | (top_p < 1.0):
        low = tl.full([], 0, tl.int64)
        total = tl.load(weights + row)
        count = tl.load(counts + row)
        if top_k > 0:
            low, total = _search(
                logits, settings, largest, sums, keys, row, row_stride, rows, vocab, splits, listed, count,
                low, tl.full([], ABOVE_ONE, tl.int64), top_k.to(tl.int64), True, BLOCK, SPLITS,
            )  # fmt: skip
            low = low << ID_BITS
        if top_p < 1.0:
            wanted = tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)
            low, _ = _search(
                logits, settings, largest, sums, keys, row, row_stride, rows, vocab, splits, listed, count,
                low, tl.full([], ABOVE_ONE, tl.int64) << ID_BITS, wanted, False, BLOCK, SPLITS,
            )  # fmt: skip
        tl.store(lowest + row, low)


@triton.jit
def _search(
    logits, settings, largest, sums, keys, row, row_stride, rows, vocab, splits, listed, count,
    low, high, wanted, BY_PROBABILITY: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """(bound, weight): the largest in [low, high) from which on there is as much as wanted, low if none; what is there.

    Of keys, by what they weigh; or of their probabilities alone, by how many there are. PIVOTS bounds are tried in one
    reading of the list; where the list is too short, of the row.
    """
    held_weight = tl.full([], 0, tl.int64)
    pivot = tl.arange(0, PIVOTS)
    while high - low > 1:
        step = (high - low + PIVOTS - 1) // PIVOTS
        bounds = (low + step * pivot)[None, :]  # the first is low itself
        amounts = tl.zeros([PIVOTS], tl.int64)
        held = tl.zeros([PIVOTS], tl.int64)
        length = tl.where(count > listed, vocab, count)
        for first in range(0, length, BLOCK):
            place = first + tl.arange(0, BLOCK)
            if count > listed:
                _, probs = probabilities(
                    logits, settings, largest, sums, row, splits, place, row_stride, rows, vocab, SPLITS
                )
                found = tl.where(weights_of(probs) > 0, key_of(probs, place), 0)
            else:
                found = tl.load(keys + row * listed + place, mask=place < count, other=0)
            weight = weights_of_keys(found)[:, None]
            if BY_PROBABILITY:
                inside = (found >> ID_BITS)[:, None] >= bounds
                amounts += tl.sum((inside & (weight > 0)).to(tl.int64), axis=0)
            else:
                inside = found[:, None] >= bounds
            held += tl.sum(tl.where(inside, weight, 0), axis=0)
        if not BY_PROBABILITY:
            amounts = held
        # amounts fall from pivot to pivot
        passed = tl.maximum(tl.sum((amounts >= wanted).to(tl.int32), axis=0), 1)
        held_weight = tl.sum(tl.where(pivot == passed - 1, held, 0), axis=0)
        high = tl.minimum(high, low + step * passed)
        low = low + step * (passed - 1)
    return low, held_weight

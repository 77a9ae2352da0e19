"""The two races of `relevo.kernels.sampling.draw`: of blocks of RACE_BLOCK ids, then of the tokens in the winner."""

from __future__ import annotations

import triton
import triton.language as tl

from relevo.kernels import sampling
from relevo.kernels.triton.probabilities import key_of, probabilities, weights_of

RACE_BLOCK = tl.constexpr(sampling.RACE_BLOCK)
FIRST_TOKEN = tl.constexpr(sampling.FIRST_TOKEN)
GOLDEN_GAMMA = tl.constexpr(sampling.GOLDEN_GAMMA)
MIX_1, MIX_2 = tl.constexpr(sampling.MIX_1), tl.constexpr(sampling.MIX_2)


@triton.jit(do_not_specialize=["rows"])
def race_kernel(
    logits, settings, largest, sums, lowest, times, winners,
    row_stride, rows, vocab, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """times, winners: [rows, splits], the first block of each chunk to come and when."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = split * CHUNK + tl.arange(0, CHUNK)
    weights = _weights(
        logits, settings, largest, sums, lowest, row, tl.num_programs(1), ids, row_stride, rows, vocab, SPLITS
    )
    blocks = tl.sum(tl.reshape(weights, [CHUNK // RACE_BLOCK, RACE_BLOCK]), axis=1)
    runners = split * (CHUNK // RACE_BLOCK) + tl.arange(0, CHUNK // RACE_BLOCK)
    first, winner = tl.min(_times(settings, row, rows, blocks, runners), axis=0, return_indices=True)
    tl.store(times + row * tl.num_programs(1) + split, first)
    tl.store(winners + row * tl.num_programs(1) + split, split * (CHUNK // RACE_BLOCK) + winner)


@triton.jit(do_not_specialize=["rows", "splits"])
def finish_kernel(
    logits, settings, largest, sums, lowest, times, winners, out,
    row_stride, rows, vocab, splits, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([SPLITS], float("inf"), tl.float64)
    block = tl.zeros([SPLITS], tl.int32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        time = tl.load(times + row * splits + split, mask=split < splits, other=float("inf"))
        winner = tl.load(winners + row * splits + split, mask=split < splits, other=0)
        block = tl.where(time < best, winner, block)
        best = tl.minimum(time, best)
    # of chunks that come at the same time, the one with the lowest block
    soonest = tl.min(best, axis=0)
    winner = tl.min(tl.where(best == soonest, block, 0x7FFFFFFF), axis=0)
    ids = winner * RACE_BLOCK + tl.arange(0, RACE_BLOCK)
    weights = _weights(logits, settings, largest, sums, lowest, row, splits, ids, row_stride, rows, vocab, SPLITS)
    token_times = _times(settings, row, rows, weights, ids.to(tl.int64) + FIRST_TOKEN)
    _, token = tl.min(token_times, axis=0, return_indices=True)
    tl.store(out + row, winner * RACE_BLOCK + token)


@triton.jit
def _weights(logits, settings, largest, sums, lowest, row, splits, ids, row_stride, rows, vocab, SPLITS: tl.constexpr):
    _, probs = probabilities(logits, settings, largest, sums, row, splits, ids, row_stride, rows, vocab, SPLITS)
    return tl.where(key_of(probs, ids) >= tl.load(lowest + row), weights_of(probs), 0)


@triton.jit
def _times(settings, row, rows, weights, runners):
    """When each comes: exponential, of rate its weight; never, if that is 0. SplitMix64 of the row's key and runner."""
    key = (tl.load(settings + 4 * rows + row) * 9007199254740992.0).to(tl.int64).to(tl.uint64)
    state = (key << 11) + (runners.to(tl.uint64) + 1) * GOLDEN_GAMMA
    state = (state ^ (state >> 30)) * MIX_1
    state = (state ^ (state >> 27)) * MIX_2
    state = state ^ (state >> 31)
    time = -tl.log(((state >> 11).to(tl.int64).to(tl.float64) + 0.5) * (2.0**-53))
    rate = tl.maximum(weights, 1).to(tl.float64)
    return tl.where(weights > 0, time / rate, float("inf"))

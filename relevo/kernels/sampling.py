"""Drawing a token from logits in plain torch, on any device: the definition of what every backend's `sample` does.

Probabilities become whole numbers before they are added: sums of whole numbers below 2**53 are exact in float64, hence
the same in whatever order a device adds them, and a row's token is the same alone, in any batch and after preemption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Probabilities in units of 2**-50: their sum stays below 2**53, hence exact; what is below one unit is never drawn.
PROBABILITY_UNITS = float(2**50)

NUM_BUCKETS = 1024  # of probabilities, by the upper bits of their float32: bit 30 is 0 up to 1.0
BUCKET_SHIFT = 20

RACE_BLOCK = 64  # ids
FIRST_TOKEN = 1 << 32  # of the runners' numbers: blocks have those below
GOLDEN_GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

DRAW_ELEMENTS = 1 << 18  # rows × vocabulary drawn from at once: bounds the temporaries, and keeps them near the cache


def sample(
    logits: Tensor,
    temperature: Sequence[float],
    min_p: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    uniforms: Sequence[float],
) -> Tensor:
    """See `Kernels.sample`. Rows that need the same filters go together: nobody pays for a neighbour's."""
    groups: dict[tuple[bool, bool, bool], list[int]] = {}
    for i in range(len(logits)):
        groups.setdefault((min_p[i] > 0.0, top_k[i] > 0, top_p[i] < 1.0), []).append(i)
    ids = logits.new_empty(len(logits), dtype=torch.int64)
    size = max(1, DRAW_ELEMENTS // logits.shape[1])
    for (has_min_p, has_top_k, has_top_p), indices in groups.items():
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            weights = filtered_weights(
                logits[part],
                temperature=[temperature[i] for i in part],
                min_p=[min_p[i] for i in part] if has_min_p else None,
                top_k=[top_k[i] for i in part] if has_top_k else None,
                top_p=[top_p[i] for i in part] if has_top_p else None,
            )
            ids[part] = draw(weights, [uniforms[i] for i in part])
    return ids


def filtered_weights(
    logits: Tensor,
    temperature: Sequence[float],
    min_p: Sequence[float] | None = None,
    top_k: Sequence[int] | None = None,
    top_p: Sequence[float] | None = None,
) -> Tensor:
    """What each token weighs in the draw: a whole number, 0 for a token that is excluded.

    logits: [n, vocab] float32, each row's maximum finite; the rest one value a row, the filters None where no row
    wants them (min_p 0, top_k >= vocab and top_p 1 leave a row as it is). Returns [n, vocab] float64.

    In this order, each on what the one before it left: min_p keeps p >= min_p * max(p); top_k keeps all that are no
    less likely than the k-th; top_p keeps the fewest likeliest tokens that hold this much, of equals those with the
    lowest ids (Holtzman et al. 2020, "The curious case of neural text degeneration").
    """
    scaled = logits / _column(temperature, logits)
    probs = scaled.softmax(dim=-1)
    if min_p is not None:
        probs.masked_fill_(probs < _column(min_p, logits) * probs.amax(dim=-1, keepdim=True), 0.0)
    if top_k is not None:
        ranks = [min(k, logits.shape[1]) for k in top_k]
        likeliest = scaled.topk(max(ranks), dim=-1).values
        kth = likeliest.gather(1, torch.tensor(ranks, device=logits.device).unsqueeze(1) - 1)
        probs.masked_fill_(scaled < kth, 0.0)
    weights = probs.to(torch.float64).mul_(PROBABILITY_UNITS).floor_()
    if top_p is not None:
        _keep_nucleus(probs, weights, _column(top_p, weights))
    return weights


def draw(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Draw by two races: of blocks of RACE_BLOCK ids, then of the tokens in the one that won.

    weights: [n, vocab] float64, whole numbers, not all 0. Returns ids, [n] int64; never one of weight 0.

    In a race each takes part with an exponential waiting time of rate its weight, made of a random number of its own:
    the first to come is each one with the odds of its weight. Two distributions that are alike mostly have the same
    winner, since the random numbers are the same (Daliri, Musco & Suresh 2024, "Coupling without communication and
    drafter-invariant speculative decoding"): so a draft model guesses not only what is likely but also what will be
    drawn. Two stages need two hundredths of the random numbers that one over all tokens does.
    """
    n, vocab = weights.shape
    num_blocks = -(-vocab // RACE_BLOCK)
    blocks = torch.nn.functional.pad(weights, (0, num_blocks * RACE_BLOCK - vocab)).view(n, num_blocks, RACE_BLOCK)
    keys = np.array([int(uniform * 2**53) for uniform in uniforms], dtype=np.uint64)[:, None]
    winner = _first(blocks.sum(dim=-1), waiting_times(keys, np.arange(num_blocks, dtype=np.uint64)))
    runners: NDArray[np.uint64] = np.array(
        [range(FIRST_TOKEN + RACE_BLOCK * block, FIRST_TOKEN + RACE_BLOCK * (block + 1)) for block in winner.tolist()],
        dtype=np.uint64,
    )
    times = waiting_times(keys, runners)
    rows = torch.arange(n, device=weights.device)
    return winner * RACE_BLOCK + _first(blocks[rows, winner], times)


def waiting_times(keys: NDArray[np.uint64], runners: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Exponential, of rate 1: of a row's runners. keys: [n, 1], each below 2**53; runners: [m] or [n, m].

    SplitMix64 (see relevo.engine.sampling_math) of the row's key and the runner's number.
    """
    state = (keys << np.uint64(11)) + (runners + np.uint64(1)) * np.uint64(GOLDEN_GAMMA)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(MIX_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(MIX_2)
    state = state ^ (state >> np.uint64(31))
    times: NDArray[np.float64] = -np.log(((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
    return times


def _first(weights: Tensor, times: NDArray[np.float64]) -> Tensor:
    """Who comes first, of weights [n, m] with these times at rate 1; of equals the lowest number."""
    return (torch.from_numpy(times).to(weights.device) / weights).argmin(dim=-1)


def _keep_nucleus(probs: Tensor, weights: Tensor, top_p: Tensor) -> None:
    """Set to 0 the weights outside each row's nucleus. probs, weights: [n, vocab]; top_p: [n, 1].

    Sorting a vocabulary takes longer than all else together. So tokens first go into buckets by the upper bits of
    their probability (the order of floats that are not negative is the order of their bits), and only the one bucket
    where the nucleus ends is sorted.
    """
    wanted = (top_p * weights.sum(dim=-1, keepdim=True)).ceil_()
    bucket = (probs.view(torch.int32) >> BUCKET_SHIFT).to(torch.int64)
    held = weights.new_zeros(len(weights), NUM_BUCKETS).scatter_add_(1, bucket, weights).flip(1)
    held_from_top = held.cumsum(dim=-1)
    last = torch.searchsorted(held_from_top, wanted)
    above = (held_from_top - held).gather(1, last)
    last_bucket = NUM_BUCKETS - 1 - last
    weights.masked_fill_(bucket < last_bucket, 0.0)

    # The last buckets, row after row, from the likeliest on; stable, so that of equals the lowest id comes first.
    rows, ids = (bucket == last_bucket).nonzero(as_tuple=True)
    by_weight = weights[rows, ids].argsort(descending=True, stable=True)
    order = by_weight[rows[by_weight].argsort(stable=True)]
    rows, ids = rows[order], ids[order]
    amounts = weights[rows, ids].to(torch.int64)
    before = amounts.cumsum(dim=0) - amounts
    row_starts = torch.searchsorted(rows, torch.arange(len(weights), device=rows.device))
    before -= before[row_starts][rows]
    outside = before >= (wanted - above).to(torch.int64).squeeze(1)[rows]
    weights[rows[outside], ids[outside]] = 0.0


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)

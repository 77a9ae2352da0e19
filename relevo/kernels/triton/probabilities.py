"""What a row's tokens weigh: the same bits in every kernel that asks."""

from __future__ import annotations

import triton
import triton.language as tl

from relevo.kernels.triton.logprobs import merged_exponentials

ID_BITS = tl.constexpr(24)  # of a key, below the 31 of its probability


@triton.jit
def scaled_logits(logits, ids, vocab, temperature):
    """temperature: float64"""
    values = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))
    return tl.div_rn(values, temperature.to(tl.float32))


@triton.jit
def probabilities(logits, settings, largest, sums, row, splits, ids, row_stride, rows, vocab, SPLITS: tl.constexpr):
    """(scaled logits, probabilities, 0 for those that min_p excludes) of some of a row's ids."""
    scaled = scaled_logits(logits + row * row_stride, ids, vocab, tl.load(settings + row))
    top, total = merged_exponentials(largest, sums, row, splits, SPLITS)
    probs = tl.div_rn(tl.exp(scaled - top), total)
    likeliest = tl.div_rn(1.0, total)
    min_p = tl.load(settings + rows + row).to(tl.float32)
    return scaled, tl.where(probs >= min_p * likeliest, probs, 0.0)


@triton.jit
def key_of(probs, ids):
    """int64: of the likelier token the larger, of equals the lowest id first."""
    return (probs.to(tl.int32, bitcast=True).to(tl.int64) << ID_BITS) | (0xFFFFFF - ids)


@triton.jit
def weights_of(probs):
    """int64, in units of 2**-50, as in relevo.kernels.sampling; exact, as only the exponent changes."""
    return (probs * 1125899906842624.0).to(tl.int64)


@triton.jit
def weights_of_keys(keys):
    return weights_of((keys >> ID_BITS).to(tl.int32).to(tl.float32, bitcast=True))

"""The inner loops of attention: logits, softmax and weighted values of one panel of query rows over one tile of keys.

A row is a query token and one of the query heads that share a kv head. Rows come in panels of 8 (decode) or 16
(more). The logits lie with rows in the lanes of vectors, so that the softmax needs no sums across lanes, and with 8
accumulators the multiplications keep both FMA units busy. All buffers are float32, and dims are padded with zeros:

    queries   [8, k_pad] or [k_pad, 16]    scaled
    keys      [tokens, k_pad]
    logits    [tokens, panel]              then the weights exp(logit - maximum)
    values    [tokens, v_pad]
    output    [panel, v_pad]               weighted values so far, not yet divided by the sums
    maxima, sums, decay [panel]
"""

from __future__ import annotations

from typing import NamedTuple

from relevo.kernels.cpu.jit import jit
from relevo.kernels.cpu.simd import (
    add,
    add_halves,
    add_pairs,
    broadcast,
    exp,
    fma,
    load,
    load_int64,
    maximum,
    multiply,
    prefetch,
    splat,
    store,
    store_float,
    subtract,
    tanh,
)

TILE_KEYS = 32  # keys and values of 64 dims, as float32, fit in half of a level-1 cache
MAX_PANEL = 16
CACHE_LINE = 64
MASKED = -1e30  # finite, so that a row that has seen no key yet computes 0 instead of NaN


class Ahead(NamedTuple):
    """Keys and values of the next tile, where they lie in the cache."""

    addresses: int  # [tokens, 2] int64, each a key's and a value's
    tokens: int
    key_bytes: int
    value_bytes: int


@jit
def logits_of_8_rows(logits: int, queries: int, keys: int, tokens: int, k_pad: int, ahead: Ahead) -> None:
    """One key at a time against 8 rows: dims lie in the lanes, because broadcasts would cost more than they feed.

    Few rows are bound by memory, so each key also asks for one of the next tile's keys and its value.
    """
    line = 4 * k_pad
    for token in range(tokens):
        if token < ahead.tokens:
            key = load_int64(ahead.addresses + 16 * token)
            for d in range(0, ahead.key_bytes, CACHE_LINE):
                prefetch(key + d)
            value = load_int64(ahead.addresses + 16 * token + 8)
            for d in range(0, ahead.value_bytes, CACHE_LINE):
                prefetch(value + d)
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = splat(0.0)
        key = keys + token * line
        for d in range(0, line, 32):
            k = load(key + d)
            query = queries + d
            s0 = fma(k, load(query), s0)
            s1 = fma(k, load(query + line), s1)
            s2 = fma(k, load(query + 2 * line), s2)
            s3 = fma(k, load(query + 3 * line), s3)
            s4 = fma(k, load(query + 4 * line), s4)
            s5 = fma(k, load(query + 5 * line), s5)
            s6 = fma(k, load(query + 6 * line), s6)
            s7 = fma(k, load(query + 7 * line), s7)
        left = add_pairs(add_pairs(s0, s1), add_pairs(s2, s3))
        right = add_pairs(add_pairs(s4, s5), add_pairs(s6, s7))
        store(logits + 32 * token, add_halves(left, right))


@jit
def logits_of_16_rows(logits: int, queries: int, keys: int, tokens: int, k_pad: int) -> None:
    """Four keys at a time against one panel of 16; `tokens` is a multiple of 4."""
    row = 4 * k_pad
    for token in range(0, tokens, 4):
        key = keys + row * token
        s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = splat(0.0)
        for d in range(k_pad):
            at = key + 4 * d
            left, right = load(queries + 64 * d), load(queries + 64 * d + 32)
            k0 = broadcast(at)
            s0, t0 = fma(k0, left, s0), fma(k0, right, t0)
            k1 = broadcast(at + row)
            s1, t1 = fma(k1, left, s1), fma(k1, right, t1)
            k2 = broadcast(at + 2 * row)
            s2, t2 = fma(k2, left, s2), fma(k2, right, t2)
            k3 = broadcast(at + 3 * row)
            s3, t3 = fma(k3, left, s3), fma(k3, right, t3)
        out = logits + 64 * token
        store(out, s0)
        store(out + 32, t0)
        store(out + 64, s1)
        store(out + 96, t1)
        store(out + 128, s2)
        store(out + 160, t2)
        store(out + 192, s3)
        store(out + 224, t3)


@jit
def cap(logits: int, count: int, softcap: float) -> None:
    """softcap * tanh(logits / softcap), in place; `count` is a multiple of 8."""
    inverse, limit = splat(1.0 / softcap), splat(softcap)
    for i in range(0, 4 * count, 32):
        store(logits + i, multiply(limit, tanh(multiply(load(logits + i), inverse))))


@jit
def mask(logits: int, tokens: int, panel: int, first_key: int, first_row: int, group: int, window: int) -> None:
    """Hide from each row the keys after its own, and those that have left its window.

    first_key counts from the position of row 0, so that row r's own position is r // group.
    """
    for lane in range(panel):
        own = (first_row + lane) // group - first_key
        gone = min(max(own - window + 1, 0), tokens)
        past = min(max(own + 1, 0), tokens)
        for token in range(gone):
            store_float(logits + 4 * (token * panel + lane), MASKED)
        for token in range(past, tokens):
            store_float(logits + 4 * (token * panel + lane), MASKED)


@jit
def softmax(logits: int, maxima: int, sums: int, decay: int, tokens: int, panel: int) -> None:
    """Turn logits into weights; update maxima and sums; leave in `decay` what earlier results are worth now."""
    for lane in range(0, 4 * panel, 32):
        before = load(maxima + lane)
        after = before
        for token in range(tokens):
            after = maximum(after, load(logits + 4 * token * panel + lane))
        shrink = exp(subtract(before, after))
        total = multiply(load(sums + lane), shrink)
        for token in range(tokens):
            at = logits + 4 * token * panel + lane
            weight = exp(subtract(load(at), after))
            store(at, weight)
            total = add(total, weight)
        store(maxima + lane, after)
        store(sums + lane, total)
        store(decay + lane, shrink)


@jit
def accumulate(
    output: int, weights: int, values: int, decay: int, rows: int, tokens: int, panel: int, v_pad: int
) -> None:
    """output = decay * output + weights @ values, four rows and 16 dims at a time."""
    line = 4 * v_pad
    for first in range(0, rows, 4):
        f0, f1 = broadcast(decay + 4 * first), broadcast(decay + 4 * first + 4)
        f2, f3 = broadcast(decay + 4 * first + 8), broadcast(decay + 4 * first + 12)
        for d in range(0, line, 64):
            o0 = output + first * line + d
            o1, o2, o3 = o0 + line, o0 + 2 * line, o0 + 3 * line
            a0, b0 = multiply(load(o0), f0), multiply(load(o0 + 32), f0)
            a1, b1 = multiply(load(o1), f1), multiply(load(o1 + 32), f1)
            a2, b2 = multiply(load(o2), f2), multiply(load(o2 + 32), f2)
            a3, b3 = multiply(load(o3), f3), multiply(load(o3 + 32), f3)
            for token in range(tokens):
                weight = weights + 4 * (token * panel + first)
                value = values + token * line + d
                left, right = load(value), load(value + 32)
                w0 = broadcast(weight)
                a0, b0 = fma(w0, left, a0), fma(w0, right, b0)
                w1 = broadcast(weight + 4)
                a1, b1 = fma(w1, left, a1), fma(w1, right, b1)
                w2 = broadcast(weight + 8)
                a2, b2 = fma(w2, left, a2), fma(w2, right, b2)
                w3 = broadcast(weight + 12)
                a3, b3 = fma(w3, left, a3), fma(w3, right, b3)
            store(o0, a0)
            store(o0 + 32, b0)
            store(o1, a1)
            store(o1 + 32, b1)
            store(o2, a2)
            store(o2 + 32, b2)
            store(o3, a3)
            store(o3 + 32, b3)

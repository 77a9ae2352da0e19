"""Drawing one token a row: probabilities, filters and draw in one pass over a row that stays in the cache."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from relevo.kernels.cpu.calls import Call, scratch
from relevo.kernels.cpu.jit import CFunction, callback, jit, sources_digest
from relevo.kernels.cpu.keys import BLOCK, token_of
from relevo.kernels.cpu.nucleus import HEAP_ENTRY, HISTOGRAM_BYTES, keep_nucleus
from relevo.kernels.cpu.race import race
from relevo.kernels.cpu.simd import (
    double_of,
    fetch_add,
    float_of,
    load_float,
    load_int64,
    record,
    store_double,
    store_int64,
)
from relevo.kernels.cpu.topk import select
from relevo.kernels.cpu.weights import (
    LOWEST,
    block_weight,
    exponentials,
    largest_logit,
    normalize,
)

VECTOR_COST = 16  # per logit, in what other kernels do per element


class Arguments(NamedTuple):
    """Addresses, counts, and strides in bytes."""

    counter: int
    workers: int
    chunk: int
    rows: int
    logits: int
    row_stride: int
    vocab: int
    params: int  # [rows] Params
    ids: int
    scratch: int
    scratch_stride: int


class Params(NamedTuple):
    """Of one row: float64, but for top_k."""

    temperature: int
    min_p: int
    top_p: int
    uniform: int
    top_k: int


_PARAMS = struct.Struct("@4dq")
_load, _ = record(Arguments)
_load_params, _ = record(Params)


def sample(
    logits: Tensor,
    temperature: Sequence[float],
    min_p: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    uniforms: Sequence[float],
) -> Tensor:
    """See `Kernels.sample`."""
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    rows, vocab = logits.shape
    params = b"".join(map(_PARAMS.pack, temperature, min_p, top_p, uniforms, top_k))
    assert len(params) == rows * _PARAMS.size, (rows, len(temperature), len(uniforms))
    ids = logits.new_empty(rows, dtype=torch.int64)
    size = _row_bytes(vocab)
    memory = scratch(size * torch.get_num_threads())
    keep = torch.frombuffer(bytearray(params), dtype=torch.uint8)
    arguments = (logits.data_ptr(), 4 * logits.stride(0), vocab, keep.data_ptr(), ids.data_ptr(), memory, size)
    _draw.run(rows, VECTOR_COST * vocab, *arguments)
    return ids


def _row_bytes(vocab: int) -> int:
    """Scratch of one worker: probabilities, sums of blocks, a histogram, and a heap."""
    blocks = -(-vocab // BLOCK)
    return 4 * BLOCK * blocks + 8 * blocks + HISTOGRAM_BYTES + HEAP_ENTRY * (vocab + blocks)


def _build() -> CFunction:
    digest = sources_digest()

    def work(address: int) -> None:
        assert digest >= 0  # closed over, so that machine code on disk is only used with the source it came from
        arguments = _load(address)
        memory = arguments.scratch + fetch_add(address + 8, 1) * arguments.scratch_stride
        while True:
            first = fetch_add(address, 1) * arguments.chunk
            if first >= arguments.rows:
                break
            for row in range(first, min(first + arguments.chunk, arguments.rows)):
                params = _load_params(arguments.params + row * 40)
                logits = arguments.logits + row * arguments.row_stride
                store_int64(arguments.ids + 8 * row, _draw_row(params, logits, arguments.vocab, memory))

    return callback(work)


_draw = Call(_build, Arguments, floats=0)
compile = _draw.compile


@jit
def _draw_row(params: Params, logits: int, vocab: int, memory: int) -> int:
    blocks = (vocab + BLOCK - 1) // BLOCK
    sums = memory + 4 * BLOCK * blocks
    histogram = sums + 8 * blocks
    heap = histogram + HISTOGRAM_BYTES
    temperature = float_of(params.temperature)
    largest = largest_logit(logits, vocab) / temperature
    least = LOWEST
    if 0 < params.top_k < vocab:
        select(logits, vocab, params.top_k, heap)
        least = load_float(logits + 4 * token_of(load_int64(heap))) / temperature
    total = exponentials(memory, logits, vocab, temperature, largest, least)
    normalize(memory, vocab, total)
    # The likeliest token's exponential is 1, so that its probability is this; min_p rounds as the torch version does.
    lowest = float_of(params.min_p) * _single(1.0 / _single(total))
    weight = _weigh(memory, sums, blocks, lowest)
    top_p = double_of(params.top_p)
    if top_p < 1.0:
        lowest = keep_nucleus(memory, blocks, lowest, math.ceil(top_p * weight) * 1.0, histogram, heap)
        _weigh(memory, sums, blocks, lowest)
    return race(memory, sums, blocks, lowest, int(double_of(params.uniform) * 2.0**53))


@jit
def _single(value: float) -> float:
    """Rounded to float32."""
    return float(np.float32(value))


@jit
def _weigh(row: int, sums: int, blocks: int, lowest: float) -> float:
    """Sums of each block's weights and of them all, without probabilities under `lowest`."""
    total = 0.0
    for block in range(blocks):
        weight = block_weight(row + 4 * BLOCK * block, lowest)
        store_double(sums + 8 * block, weight)
        total += weight
    return total

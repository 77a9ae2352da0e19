"""Log-probabilities of a few tokens a row."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from relevo.kernels.cpu.calls import Call
from relevo.kernels.cpu.elements import sum_of_lanes
from relevo.kernels.cpu.jit import CFunction, callback, jit, sources_digest
from relevo.kernels.cpu.simd import (
    LANES,
    add,
    exp,
    fetch_add,
    load,
    load_float,
    load_int64,
    record,
    splat,
    store_float,
    store_int64,
    subtract,
    where_exceeded,
)
from relevo.kernels.cpu.weights import largest_logit

SPAN = 1024  # logits whose exponentials and counts are summed up in float32 before they go into a float64


class Arguments(NamedTuple):
    """Addresses, counts, and strides in bytes."""

    counter: int
    workers: int
    chunk: int
    rows: int
    logits: int
    row_stride: int
    vocab: int
    token_ids: int  # [rows, num_ids] int64
    num_ids: int
    logprobs: int  # [rows, num_ids] float32
    likelier: int  # [rows] int64


_load, _ = record(Arguments)


def score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.score`."""
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    assert token_ids.dtype == torch.int64 and token_ids.is_contiguous(), (token_ids.dtype, token_ids.stride())
    (rows, vocab), count = logits.shape, token_ids.shape[1]
    assert token_ids.shape[0] == rows and count > 0, (token_ids.shape, logits.shape)
    logprobs, likelier = logits.new_empty(rows, count), token_ids.new_empty(rows)
    addresses = (token_ids.data_ptr(), count, logprobs.data_ptr(), likelier.data_ptr())
    _score.run(rows, 8 * vocab, logits.data_ptr(), 4 * logits.stride(0), vocab, *addresses)
    return logprobs, likelier


def _build() -> CFunction:
    digest = sources_digest()

    def work(address: int) -> None:
        assert digest >= 0  # closed over, so that machine code on disk is only used with the source it came from
        arguments = _load(address)
        while True:
            first = fetch_add(address, 1) * arguments.chunk
            if first >= arguments.rows:
                break
            for row in range(first, min(first + arguments.chunk, arguments.rows)):
                _score_row(arguments, row)

    return callback(work)


_score = Call(_build, Arguments, floats=0)
compile = _score.compile


@jit
def _score_row(arguments: Arguments, row: int) -> None:
    logits, vocab = arguments.logits + row * arguments.row_stride, arguments.vocab
    token_ids = arguments.token_ids + 8 * row * arguments.num_ids
    chosen = load_float(logits + 4 * load_int64(token_ids))
    largest = largest_logit(logits, vocab)
    whole = vocab - vocab % LANES
    total, exceeding = 0.0, 0.0
    for first in range(0, whole, SPAN):
        sums = counts = splat(0.0)
        for i in range(4 * first, 4 * min(first + SPAN, whole), 4 * LANES):
            x = load(logits + i)
            sums = add(sums, exp(subtract(x, splat(largest))))
            counts = add(counts, where_exceeded(x, splat(chosen), splat(1.0)))
        total += sum_of_lanes(sums)
        exceeding += sum_of_lanes(counts)
    for i in range(whole, vocab):
        x = load_float(logits + 4 * i)
        total += math.exp(x - largest)
        exceeding += x > chosen
    store_int64(arguments.likelier + 8 * row, int(exceeding))
    shift = math.log(total)
    for i in range(arguments.num_ids):
        x = load_float(logits + 4 * load_int64(token_ids + 8 * i))
        store_float(arguments.logprobs + 4 * (row * arguments.num_ids + i), x - largest - shift)

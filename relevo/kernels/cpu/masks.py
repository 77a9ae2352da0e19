"""Excluding tokens by a bit mask: one pass over a row, eight logits for each byte of the mask."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from llvmlite import ir  # type: ignore[import-untyped]  # ships no types
from numba import types
from torch import Tensor

from relevo.kernels.cpu.calls import Call
from relevo.kernels.cpu.jit import CFunction, callback, jit, sources_digest
from relevo.kernels.cpu.simd import (
    LANES,
    fetch_add,
    load,
    load_int32,
    load_int64,
    operation,
    record,
    store,
    store_float,
    vector,
)

WORD = 32  # tokens in an int32 of a mask
ALL = -1

_I8, _FLOATS = ir.IntType(8), ir.VectorType(ir.FloatType(), LANES)


class Arguments(NamedTuple):
    """Addresses, counts, and strides in bytes."""

    counter: int
    workers: int
    chunk: int
    rows: int
    logits: int
    row_stride: int
    vocab: int
    indices: int  # [rows] int64
    masks: int
    mask_stride: int


_load, _ = record(Arguments)


def mask_logits(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """See `Kernels.mask_logits`."""
    vocab, count = logits.shape[1], len(rows)
    assert logits.stride(1) == 1 and masks.stride(1) == 1 and rows.is_contiguous()
    assert masks.shape == (count, -(-vocab // WORD)), (masks.shape, vocab)
    strides = 4 * logits.stride(0), 4 * masks.stride(0)
    _mask.run(count, vocab, logits.data_ptr(), strides[0], vocab, rows.data_ptr(), masks.data_ptr(), strides[1])


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
                index = load_int64(arguments.indices + 8 * row)
                mask = arguments.masks + row * arguments.mask_stride
                _mask_row(arguments.logits + index * arguments.row_stride, mask, arguments.vocab)

    return callback(work)


_mask = Call(_build, Arguments, floats=0)
compile = _mask.compile


def _kept(builder: Any, logits: Any, word: Any) -> Any:
    """Eight logits where the lowest eight bits of the word are set, -inf elsewhere."""
    lanes = builder.bitcast(builder.trunc(word, _I8), ir.VectorType(ir.IntType(1), LANES))
    return builder.select(lanes, logits, ir.Constant(_FLOATS, [-math.inf] * LANES))


kept = operation(vector, _kept, vector, types.int64)


@jit
def _mask_row(logits: int, mask: int, vocab: int) -> None:
    whole = vocab - vocab % WORD
    for first in range(0, whole, WORD):
        word = load_int32(mask + first // 8)
        if word != ALL:
            for lane in range(0, WORD, LANES):
                at = logits + 4 * (first + lane)
                store(at, kept(load(at), word >> lane))
    for token_id in range(whole, vocab):
        if not (load_int32(mask + whole // 8) >> (token_id - whole)) & 1:
            store_float(logits + 4 * token_id, -math.inf)

"""The largest logits of each row, without sorting the vocabulary.

A row is read once for the largest of each block of logits. At least k logits are as large as the k-th largest of those,
so that only blocks that reach it are looked into: about k of the thousands there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from relevo.kernels.cpu.calls import Call, scratch
from relevo.kernels.cpu.jit import CFunction, callback, jit, sources_digest
from relevo.kernels.cpu.keys import BLOCK, LOWEST_KEY, block_key, candidate, load_key, offer, pop_smallest, token_of
from relevo.kernels.cpu.simd import copy_bytes, fetch_add, load_int64, record, store_int64


class Arguments(NamedTuple):
    """Addresses, and counts; a row of `logits` is contiguous and row_stride bytes after the one before."""

    counter: int
    workers: int
    chunk: int
    rows: int
    logits: int
    row_stride: int
    vocab: int
    k: int  # 0: only the id of the largest
    values: int
    ids: int
    scratch: int
    scratch_stride: int


_load, _ = record(Arguments)


def argmax(logits: Tensor) -> Tensor:
    """See `Kernels.argmax`. As in torch, NaN is larger than any number."""
    _check(logits)
    ids = logits.new_empty(len(logits), dtype=torch.int64)
    _run(logits, 0, 0, ids.data_ptr())
    return ids


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `Kernels.top_k`. As in torch, NaN is larger than any number."""
    _check(logits)
    assert 0 < k <= logits.shape[1], (k, logits.shape)
    values = logits.new_empty(len(logits), k)
    ids = values.new_empty(values.shape, dtype=torch.int64)
    _run(logits, k, values.data_ptr(), ids.data_ptr())
    return values, ids


def _check(logits: Tensor) -> None:
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    assert 0 < logits.shape[1] < 1 << 32, logits.shape


def _run(logits: Tensor, k: int, values: int, ids: int) -> None:
    rows, vocab = logits.shape
    size = 8 * (k + -(-vocab // BLOCK)) if k else 0
    memory = scratch(size * torch.get_num_threads()) if k else 0
    _select.run(rows, vocab, logits.data_ptr(), 4 * logits.stride(0), vocab, k, values, ids, memory, size)


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
                logits = arguments.logits + row * arguments.row_stride
                if arguments.k == 0:
                    store_int64(arguments.ids + 8 * row, token_of(_largest(logits, arguments.vocab)))
                else:
                    size = select(logits, arguments.vocab, arguments.k, memory)
                    _write(arguments, logits, row, memory, size)

    return callback(work)


_select = Call(_build, Arguments, floats=0)
compile = _select.compile


@jit
def _largest(logits: int, vocab: int) -> int:
    """The largest candidate."""
    best, best_block = LOWEST_KEY, 0
    for block in range(0, vocab, BLOCK):
        key = block_key(logits + 4 * block, min(BLOCK, vocab - block))
        if key > best:
            best, best_block = key, block
    token_id = best_block
    while load_key(logits + 4 * token_id) != best:
        token_id += 1
    return candidate(best, token_id)


@jit
def select(logits: int, vocab: int, k: int, memory: int) -> int:
    """Leave the k largest candidates in a heap at the beginning of memory; memory: [k + blocks] int64."""
    num_blocks = (vocab + BLOCK - 1) // BLOCK
    keys, size = memory + 8 * k, 0
    for block in range(num_blocks):
        key = block_key(logits + 4 * BLOCK * block, min(BLOCK, vocab - BLOCK * block))
        store_int64(keys + 8 * block, key)
        size = offer(memory, size, k, key)
    least = load_int64(memory) if size == k else LOWEST_KEY
    size = 0
    for block in range(num_blocks):
        if load_int64(keys + 8 * block) >= least:
            for token_id in range(BLOCK * block, min(BLOCK * (block + 1), vocab)):
                key = load_key(logits + 4 * token_id)
                if key >= least:
                    size = offer(memory, size, k, candidate(key, token_id))
    return size


@jit
def _write(arguments: Arguments, logits: int, row: int, heap: int, size: int) -> None:
    """Empty the heap into the row's values and ids, from the last on."""
    for at in range(size - 1, -1, -1):
        token_id = token_of(pop_smallest(heap, at + 1))
        entry = row * arguments.k + at
        store_int64(arguments.ids + 8 * entry, token_id)
        copy_bytes(arguments.values + 4 * entry, logits + 4 * token_id, 4)

"""How a batch's attention is cut into items of work that threads take one after another."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from relevo.kernels.cpu.jit import jit
from relevo.kernels.cpu.simd import load_int32

MAX_ROWS = 128  # query rows (tokens × query heads of one kv head) that share one reading of the keys
ITEMS_PER_THREAD = 4  # enough that a thread which lost its core for a while does not hold up the others
MIN_SPLIT_KEYS = 256  # below, merging a split costs more than it gains

Table = npt.NDArray[np.int64]


class Problem(NamedTuple):
    """One call's arguments: addresses and strides in bytes, everything else in elements."""

    query: int
    key: int
    value: int
    output: int
    block_table: int
    seq_lens: int
    cu_seqlens_q: int
    sinks: int  # of float32; 0: none
    query_token_stride: int
    query_head_stride: int
    key_block_stride: int
    key_token_stride: int
    key_head_stride: int
    value_block_stride: int
    value_token_stride: int
    value_head_stride: int
    block_table_stride: int
    query_element: int
    cache_element: int
    num_seqs: int
    max_blocks: int
    num_blocks: int
    block_size: int
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    window: int  # longer than any context: none
    workers: int
    scale: float
    softcap: float  # 0: none


# A tile's columns: tokens [FIRST, FIRST + TOKENS) of the batch, the first of them at POSITION of its sequence;
# keys [BEGIN, END) of that sequence. Between them its queries see all of these keys.
SEQUENCE, FIRST, TOKENS, POSITION, BEGIN, END = range(6)
TILE_COLUMNS = 6

# An item is a tile for one kv head, or one of SPLITS parts of it that have the same queries and different keys.
# Such parts are a GROUP, counted from 0, and leave their results in PARTIAL, PARTIAL + 1, …
KV_HEAD, SPLIT, SPLITS, PARTIAL, GROUP = range(TILE_COLUMNS, TILE_COLUMNS + 5)
ITEM_COLUMNS = TILE_COLUMNS + 5


@jit
def plan(problem: Problem) -> tuple[Table, int, int]:
    """Cut the batch into items: ([items, ITEM_COLUMNS], how many partial results, how many groups).

    Raises IndexError if a block that would be read is not in the table, or not in the cache.
    """
    tiles = _tiles(problem)
    total_cost = 0
    for tile in range(len(tiles)):
        total_cost += problem.kv_heads * _cost(tiles[tile])
    num_items = 0
    for tile in range(len(tiles)):
        num_items += problem.kv_heads * _splits(problem, tiles[tile], total_cost)

    items = np.empty((num_items, ITEM_COLUMNS), np.int64)
    item = partials = groups = 0
    for tile in range(len(tiles)):
        splits = _splits(problem, tiles[tile], total_cost)
        begin, end = tiles[tile, BEGIN], tiles[tile, END]
        for kv_head in range(problem.kv_heads):
            for split in range(splits):
                items[item, :TILE_COLUMNS] = tiles[tile]
                items[item, BEGIN] = begin + (end - begin) * split // splits
                items[item, END] = begin + (end - begin) * (split + 1) // splits
                items[item, KV_HEAD] = kv_head
                items[item, SPLIT] = split
                items[item, SPLITS] = splits
                items[item, PARTIAL] = partials
                items[item, GROUP] = groups
                item += 1
            if splits > 1:
                partials += splits
                groups += 1
    return items, partials, groups


@jit
def tokens_per_tile(problem: Problem) -> int:
    """How many tokens of one sequence a tile holds at most."""
    return max(1, MAX_ROWS // (problem.heads // problem.kv_heads))


@jit
def _tiles(problem: Problem) -> Table:
    size = tokens_per_tile(problem)
    count = 0
    for sequence in range(problem.num_seqs):
        at = problem.cu_seqlens_q + 4 * sequence
        count += (load_int32(at + 4) - load_int32(at) + size - 1) // size
    tiles = np.empty((count, TILE_COLUMNS), np.int64)
    tile = 0
    for sequence in range(problem.num_seqs):
        at = problem.cu_seqlens_q + 4 * sequence
        first, past = load_int32(at), load_int32(at + 4)
        seq_len = load_int32(problem.seq_lens + 4 * sequence)
        if first < past:
            first_key = max(0, seq_len - (past - first) - problem.window + 1)
            _check_blocks(problem, sequence, first_key // problem.block_size, (seq_len - 1) // problem.block_size)
        for token in range(first, past, size):
            tokens = min(size, past - token)
            position = seq_len - (past - token)
            tiles[tile, SEQUENCE] = sequence
            tiles[tile, FIRST] = token
            tiles[tile, TOKENS] = tokens
            tiles[tile, POSITION] = position
            tiles[tile, BEGIN] = max(0, position - problem.window + 1)
            tiles[tile, END] = position + tokens
            tile += 1
    return tiles


@jit
def _check_blocks(problem: Problem, sequence: int, first: int, last: int) -> None:
    if last >= problem.max_blocks:
        raise IndexError("a sequence in seq_lens is longer than its row in block_table")
    for block in range(first, last + 1):
        block_id = load_int32(problem.block_table + sequence * problem.block_table_stride + 4 * block)
        if block_id < 0 or block_id >= problem.num_blocks:
            raise IndexError("block_table names a block that is not in the cache")


@jit
def _cost(tile: Table) -> int:
    return tile[TOKENS] * (tile[END] - tile[BEGIN])  # type: ignore[no-any-return]  # numba makes it an int


@jit
def _splits(problem: Problem, tile: Table, total_cost: int) -> int:
    if problem.workers == 1:
        return 1
    share = max(1, total_cost // (problem.workers * ITEMS_PER_THREAD))
    most = max(1, (tile[END] - tile[BEGIN]) // MIN_SPLIT_KEYS)
    return min(most, (_cost(tile) + share - 1) // share)

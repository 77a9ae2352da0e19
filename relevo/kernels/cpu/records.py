"""What compiled functions are told, as records of int64 in memory: a call's arguments, and items of its work."""

from __future__ import annotations

import struct
from typing import NamedTuple

from relevo.kernels.cpu.simd import record


class Problem(NamedTuple):
    """One call's arguments: first what differs from layer to layer, then what all layers of a kind share.

    Addresses, strides in bytes, counts; and two float64, read with `float_of`.
    """

    query: int
    key: int
    value: int
    output: int
    sinks: int  # of float32; 0: none
    scale: float
    softcap: float  # 0: none
    block_table: int
    seq_lens: int
    cu_seqlens_q: int
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


class Item(NamedTuple):
    """Work for one thread: some queries of a sequence, for one kv head, over some of the keys.

    Its queries are tokens [first, first + tokens) of the batch, the first of them at `position` of its sequence; its
    keys are [begin, end) of that sequence. If splits > 1, so many items have the same queries and share the keys.
    """

    sequence: int
    first: int
    tokens: int
    position: int
    begin: int
    end: int
    kv_head: int
    split: int  # which of the splits
    splits: int
    partial: int  # where results of the first of the splits go, counted in results
    group: int  # counts those that are split


class Work(NamedTuple):
    """What a worker thread is handed."""

    problem: int  # address of the Problem
    items: int  # [num_items] Item
    num_items: int
    counters: int  # [2 + groups] int64, zero: threads that came; items taken; splits done of each group
    scratch: int  # [workers, scratch_floats] float32
    results: int  # [partials, result_floats] float32


OWN = struct.Struct("@5q2d")  # Problem's fields of one layer
SHARED = struct.Struct(f"@{len(Problem._fields) - 7}q")  # and the others
WORK = struct.Struct(f"@{len(Work._fields)}q")
ITEM_FIELDS = len(Item._fields)

load_problem, _ = record(Problem)
load_item, store_item = record(Item)
load_work, _ = record(Work)

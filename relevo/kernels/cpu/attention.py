"""Attention over one item of work, and the entry point that hands the items to threads."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import numpy.typing as npt

from relevo.kernels.cpu import plan as columns
from relevo.kernels.cpu.buffers import Buffers, Result, buffers_at, padded, result_at, result_floats, scratch_floats
from relevo.kernels.cpu.finish import merge, write
from relevo.kernels.cpu.jit import entry_point, jit, sources_digest
from relevo.kernels.cpu.plan import Problem, Table, plan
from relevo.kernels.cpu.simd import (
    FLOAT32,
    fetch_add,
    load_float,
    load_int32,
    prefetch,
    splat,
    store,
    store_float,
    widen,
)
from relevo.kernels.cpu.tile import (
    MASKED,
    MAX_PANEL,
    TILE_KEYS,
    accumulate,
    cap,
    logits_of_8_rows,
    logits_of_16_rows,
    mask,
    softmax,
)

Floats = npt.NDArray[np.float32]


def _build(digest: int) -> Callable[[Problem], None]:
    @entry_point(parallel=True)
    def attend(problem: Problem) -> None:
        assert digest >= 0  # closed over, so that machine code on disk is only used with the source it came from
        items, partials, groups = plan(problem)
        counters, scratch, results = _workspace(problem, partials, groups)
        for worker in numba.prange(problem.workers):
            _work(problem, items, counters, scratch[worker], results)

    return attend


attend = _build(sources_digest())


@jit
def _workspace(problem: Problem, partials: int, groups: int) -> tuple[Table, Floats, Floats]:
    """Counters (of items taken, then of each group's parts done), threads' scratch, and partial results."""
    counters = np.zeros(1 + groups, np.int64)
    scratch = np.empty((problem.workers, scratch_floats(problem)), np.float32)
    return counters, scratch, np.empty(partials * result_floats(problem), np.float32)


@jit
def _work(problem: Problem, items: Table, counters: Table, scratch: Floats, results: Floats) -> None:
    """Take items until none is left. Arrays are arguments, so that they outlive the addresses taken of them."""
    buffers = buffers_at(problem, scratch.ctypes.data)
    size = 4 * result_floats(problem)
    while True:
        taken = fetch_add(counters.ctypes.data, 1)
        if taken >= len(items):
            return
        item = items[taken]
        splits = item[columns.SPLITS]
        if splits == 1:
            _attend_item(problem, item, buffers, buffers.result)
            write(problem, item, buffers.result, buffers.line)
            continue
        mine = results.ctypes.data + item[columns.PARTIAL] * size
        _attend_item(problem, item, buffers, result_at(problem, mine + item[columns.SPLIT] * size))
        # whoever is last to finish a group's parts puts them together
        if fetch_add(counters.ctypes.data + 8 * (1 + item[columns.GROUP]), 1) == splits - 1:
            merge(problem, item, mine, size)
            write(problem, item, result_at(problem, mine), buffers.line)


@jit
def _attend_item(problem: Problem, item: Table, buffers: Buffers, result: Result) -> None:
    group = problem.heads // problem.kv_heads
    rows = item[columns.TOKENS] * group
    panel = 8 if rows <= 8 else MAX_PANEL
    _load_queries(problem, item, buffers, rows, panel)
    _clear(problem, item, result, rows)
    begin, end = item[columns.BEGIN], item[columns.END]
    for first_key in range(begin, end, TILE_KEYS):
        tokens = min(TILE_KEYS, end - first_key)
        _load_keys(problem, item, buffers, first_key, tokens)
        for first_row in range(0, rows, panel):
            _attend_panel(problem, item, buffers, result, panel, rows, first_row, first_key, tokens)


@jit
def _attend_panel(
    problem: Problem,
    item: Table,
    buffers: Buffers,
    result: Result,
    panel: int,
    rows: int,
    first_row: int,
    first_key: int,
    tokens: int,
) -> None:
    """One panel of rows against the tile's keys [first_key, first_key + tokens)."""
    group = problem.heads // problem.kv_heads
    last_row = min(first_row + panel, rows) - 1
    low = item[columns.POSITION] + first_row // group
    high = item[columns.POSITION] + last_row // group
    tokens = min(tokens, high + 1 - first_key)
    if tokens <= 0 or first_key + tokens <= low - problem.window + 1:
        return
    logits, queries = buffers.logits, buffers.queries + 4 * first_row * problem.k_dim
    computed = (tokens + 7) // 8 * 8
    if panel == 8:
        logits_of_8_rows(logits, queries, buffers.keys, computed, problem.k_dim)
    else:
        logits_of_16_rows(logits, queries, buffers.keys, computed, problem.k_dim)
    if problem.softcap > 0.0:
        cap(logits, tokens * panel, problem.softcap)
    if first_key + tokens - 1 > low or first_key <= high - problem.window:
        mask(logits, tokens, panel, first_key - item[columns.POSITION], first_row, group, problem.window)
    softmax(logits, result.maxima + 4 * first_row, result.sums + 4 * first_row, buffers.decay, tokens, panel)
    v_pad = padded(problem.v_dim)
    output = result.output + 4 * first_row * v_pad
    accumulate(output, logits, buffers.values, buffers.decay, last_row + 1 - first_row, tokens, panel, v_pad)


@jit
def _load_queries(problem: Problem, item: Table, buffers: Buffers, rows: int, panel: int) -> None:
    """Scale the item's queries and lay them into panels; rows past the last are zero."""
    group = problem.heads // problem.kv_heads
    head = item[columns.KV_HEAD] * group
    scale = np.float32(problem.scale)
    for row in range((rows + panel - 1) // panel * panel):
        target = buffers.queries + 4 * ((row // panel) * panel * problem.k_dim + row % panel)
        if row < rows:
            token = item[columns.FIRST] + row // group
            source = problem.query + token * problem.query_token_stride
            source += (head + row % group) * problem.query_head_stride
            widen(buffers.line, source, problem.k_dim, problem.query_element)
            for d in range(problem.k_dim):
                store_float(target + 4 * d * panel, load_float(buffers.line + 4 * d) * scale)
        else:
            for d in range(problem.k_dim):
                store_float(target + 4 * d * panel, 0.0)


@jit
def _clear(problem: Problem, item: Table, result: Result, rows: int) -> None:
    """A result over no keys; a sink counts as a key of no value, seen once."""
    group = problem.heads // problem.kv_heads
    whole = padded(rows)
    for at in range(0, 4 * whole * padded(problem.v_dim), 32):
        store(result.output + at, splat(0.0))
    for row in range(whole):
        maximum, total = MASKED, 0.0
        if problem.sinks != 0 and item[columns.SPLIT] == 0 and row < rows:
            maximum = load_float(problem.sinks + 4 * (item[columns.KV_HEAD] * group + row % group))
            total = 1.0
        store_float(result.maxima + 4 * row, maximum)
        store_float(result.sums + 4 * row, total)


@jit
def _load_keys(problem: Problem, item: Table, buffers: Buffers, first_key: int, tokens: int) -> None:
    """Gather the tile's keys and values as float32, and ask memory for the next tile's."""
    v_pad = padded(problem.v_dim)
    size = 4 if problem.cache_element == FLOAT32 else 2
    table = problem.block_table + item[columns.SEQUENCE] * problem.block_table_stride
    key_head = problem.key + item[columns.KV_HEAD] * problem.key_head_stride
    value_head = problem.value + item[columns.KV_HEAD] * problem.value_head_stride
    for token in range(tokens):
        position = first_key + token
        block_id, offset = load_int32(table + 4 * (position // problem.block_size)), position % problem.block_size
        key = key_head + block_id * problem.key_block_stride + offset * problem.key_token_stride
        value = value_head + block_id * problem.value_block_stride + offset * problem.value_token_stride
        widen(buffers.keys + 4 * token * problem.k_dim, key, problem.k_dim, problem.cache_element)
        widen(buffers.values + 4 * token * v_pad, value, problem.v_dim, problem.cache_element)
        for d in range(problem.v_dim, v_pad):
            store_float(buffers.values + 4 * (token * v_pad + d), 0.0)
    for position in range(first_key + TILE_KEYS, min(first_key + 2 * TILE_KEYS, item[columns.END])):
        block_id, offset = load_int32(table + 4 * (position // problem.block_size)), position % problem.block_size
        key = key_head + block_id * problem.key_block_stride + offset * problem.key_token_stride
        value = value_head + block_id * problem.value_block_stride + offset * problem.value_token_stride
        for at in range(0, problem.k_dim * size, 64):
            prefetch(key + at)
        for at in range(0, problem.v_dim * size, 64):
            prefetch(value + at)

"""Attention over one item of work, and the entry point that hands the items to threads."""

from __future__ import annotations

from relevo.kernels.cpu.buffers import Buffers, Result, buffers_at, padded, result_at, result_floats, scratch_floats
from relevo.kernels.cpu.finish import merge, write
from relevo.kernels.cpu.jit import callback, jit, sources_digest
from relevo.kernels.cpu.records import ITEM_FIELDS, Item, Problem, load_item, load_problem, load_work
from relevo.kernels.cpu.simd import (
    FLOAT32,
    fetch_add,
    float_of,
    load_float,
    load_int32,
    prefetch,
    splat,
    store,
    store_float,
    widen,
    widen_rows,
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


def build_worker() -> int:
    """The address of `void work(const Work *)`, which each thread calls: it takes items until none is left."""
    digest = sources_digest()

    def work(address: int) -> None:
        assert digest >= 0  # closed over, so that machine code on disk is only used with the source it came from
        work = load_work(address)
        problem = load_problem(work.problem)
        worker = fetch_add(work.counters, 1)
        buffers = buffers_at(problem, work.scratch + 4 * worker * scratch_floats(problem))
        size = 4 * result_floats(problem)
        while True:
            taken = fetch_add(work.counters + 8, 1)
            if taken >= work.num_items:
                break
            item = load_item(work.items + 8 * ITEM_FIELDS * taken)
            if item.splits == 1:
                _attend_item(problem, item, buffers, buffers.result)
                write(problem, item, buffers.result, buffers.line)
                continue
            parts = work.results + item.partial * size
            _attend_item(problem, item, buffers, result_at(problem, parts + item.split * size))
            # whoever is last to finish one of the splits puts them together
            if fetch_add(work.counters + 16 + 8 * item.group, 1) == item.splits - 1:
                merge(problem, item, parts, size)
                write(problem, item, result_at(problem, parts), buffers.line)

    return callback(work)


@jit
def _attend_item(problem: Problem, item: Item, buffers: Buffers, result: Result) -> None:
    group = problem.heads // problem.kv_heads
    rows = item.tokens * group
    panel = 8 if rows <= 8 else MAX_PANEL
    _load_queries(problem, item, buffers, rows, panel)
    _clear(problem, item, result, rows)
    begin, end = item.begin, item.end
    for first_key in range(begin, end, TILE_KEYS):
        tokens = min(TILE_KEYS, end - first_key)
        _load_keys(problem, item, buffers, first_key, tokens)
        for first_row in range(0, rows, panel):
            _attend_panel(problem, item, buffers, result, panel, rows, first_row, first_key, tokens)


@jit
def _attend_panel(
    problem: Problem,
    item: Item,
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
    low = item.position + first_row // group
    high = item.position + last_row // group
    tokens = min(tokens, high + 1 - first_key)
    if tokens <= 0 or first_key + tokens <= low - problem.window + 1:
        return
    logits, queries = buffers.logits, buffers.queries + 4 * first_row * problem.k_dim
    computed = (tokens + 7) // 8 * 8
    if panel == 8:
        logits_of_8_rows(logits, queries, buffers.keys, computed, problem.k_dim)
    else:
        logits_of_16_rows(logits, queries, buffers.keys, computed, problem.k_dim)
    softcap = float_of(problem.softcap)
    if softcap > 0.0:
        cap(logits, tokens * panel, softcap)
    if first_key + tokens - 1 > low or first_key <= high - problem.window:
        mask(logits, tokens, panel, first_key - item.position, first_row, group, problem.window)
    softmax(logits, result.maxima + 4 * first_row, result.sums + 4 * first_row, buffers.decay, tokens, panel)
    v_pad = padded(problem.v_dim)
    output = result.output + 4 * first_row * v_pad
    accumulate(output, logits, buffers.values, buffers.decay, last_row + 1 - first_row, tokens, panel, v_pad)


@jit
def _load_queries(problem: Problem, item: Item, buffers: Buffers, rows: int, panel: int) -> None:
    """Scale the item's queries and lay them into panels; rows past the last are zero."""
    group = problem.heads // problem.kv_heads
    head = item.kv_head * group
    scale = float_of(problem.scale)
    for row in range((rows + panel - 1) // panel * panel):
        target = buffers.queries + 4 * ((row // panel) * panel * problem.k_dim + row % panel)
        if row < rows:
            token = item.first + row // group
            source = problem.query + token * problem.query_token_stride
            source += (head + row % group) * problem.query_head_stride
            widen(buffers.line, source, problem.k_dim, problem.query_element)
            for d in range(problem.k_dim):
                store_float(target + 4 * d * panel, load_float(buffers.line + 4 * d) * scale)
        else:
            for d in range(problem.k_dim):
                store_float(target + 4 * d * panel, 0.0)


@jit
def _clear(problem: Problem, item: Item, result: Result, rows: int) -> None:
    """A result over no keys; a sink counts as a key of no value, seen once."""
    group = problem.heads // problem.kv_heads
    whole = padded(rows)
    for at in range(0, 4 * whole * padded(problem.v_dim), 32):
        store(result.output + at, splat(0.0))
    for row in range(whole):
        maximum, total = MASKED, 0.0
        if problem.sinks != 0 and item.split == 0 and row < rows:
            maximum = load_float(problem.sinks + 4 * (item.kv_head * group + row % group))
            total = 1.0
        store_float(result.maxima + 4 * row, maximum)
        store_float(result.sums + 4 * row, total)


@jit
def _load_keys(problem: Problem, item: Item, buffers: Buffers, first_key: int, tokens: int) -> None:
    """Gather the tile's keys and values as float32, and ask memory for the next tile's."""
    v_pad, size, element = padded(problem.v_dim), problem.block_size, problem.cache_element
    key_bytes, value_bytes = (4 * problem.k_dim, 4 * problem.v_dim) if element == FLOAT32 else (2 * problem.k_dim, 2 * problem.v_dim)
    table = problem.block_table + item.sequence * problem.block_table_stride
    keys = problem.key + item.kv_head * problem.key_head_stride
    values = problem.value + item.kv_head * problem.value_head_stride
    past = first_key + tokens
    end = min(past + TILE_KEYS, item.end)
    for block in range(first_key // size, (end - 1) // size + 1):
        block_id = load_int32(table + 4 * block)
        key = keys + block_id * problem.key_block_stride
        value = values + block_id * problem.value_block_stride
        # this block's tokens: [begin, middle) are the tile's, [middle, stop) are the next one's
        begin, stop = max(first_key, block * size), min(end, (block + 1) * size)
        middle = min(max(past, begin), stop)
        key += (begin - block * size) * problem.key_token_stride
        value += (begin - block * size) * problem.value_token_stride
        at = begin - first_key
        count = middle - begin
        if count > 0:
            widen_rows(buffers.keys + 4 * at * problem.k_dim, 4 * problem.k_dim, key, problem.key_token_stride, count, problem.k_dim, element)
            widen_rows(buffers.values + 4 * at * v_pad, 4 * v_pad, value, problem.value_token_stride, count, problem.v_dim, element)
            for token in range(at, at + count):
                for d in range(problem.v_dim, v_pad):
                    store_float(buffers.values + 4 * (token * v_pad + d), 0.0)
            key += count * problem.key_token_stride
            value += count * problem.value_token_stride
        for _ in range(middle, stop):
            for line in range(0, key_bytes, 64):
                prefetch(key + line)
            for line in range(0, value_bytes, 64):
                prefetch(value + line)
            key += problem.key_token_stride
            value += problem.value_token_stride

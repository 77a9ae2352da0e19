"""Attention over one item of work, and the entry point that hands the items to threads."""

from __future__ import annotations

from relevo.kernels.cpu.buffers import Buffers, Result, buffers_at, padded, result_at, result_floats, scratch_floats
from relevo.kernels.cpu.finish import merge, write
from relevo.kernels.cpu.jit import CFunction, callback, jit, sources_digest
from relevo.kernels.cpu.records import ITEM_FIELDS, Item, Problem, load_item, load_problem, load_work
from relevo.kernels.cpu.simd import (
    FLOAT32,
    fetch_add,
    float_of,
    load_float,
    load_int32,
    splat,
    store,
    store_float,
    store_int64,
    widen_rows,
)
from relevo.kernels.cpu.tile import (
    MASKED,
    MAX_PANEL,
    TILE_KEYS,
    Ahead,
    accumulate,
    cap,
    logits_of_8_rows,
    logits_of_16_rows,
    mask,
    softmax,
)


def build_worker() -> CFunction:
    """`void work(const Work *)`, which each thread calls: it takes items until none is left."""
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
        ahead = _look_ahead(problem, item, buffers, first_key + TILE_KEYS)
        for first_row in range(0, rows, panel):
            _attend_panel(problem, item, buffers, result, panel, rows, first_row, first_key, tokens, ahead)


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
    ahead: Ahead,
) -> None:
    """One panel of rows against the tile's keys [first_key, first_key + tokens)."""
    group = problem.heads // problem.kv_heads
    last_row = min(first_row + panel, rows) - 1
    low = item.position + first_row // group
    high = item.position + last_row // group
    tokens = min(tokens, high + 1 - first_key)
    if tokens <= 0 or first_key + tokens <= low - problem.window + 1:
        return
    k_pad, v_pad = padded(problem.k_dim), padded(problem.v_dim)
    logits, queries = buffers.logits, buffers.queries + 4 * first_row * k_pad
    if panel == 8:
        logits_of_8_rows(logits, queries, buffers.keys, tokens, k_pad, ahead)
    else:
        logits_of_16_rows(logits, queries, buffers.keys, (tokens + 3) // 4 * 4, k_pad)
    softcap = float_of(problem.softcap)
    if softcap > 0.0:
        cap(logits, tokens * panel, softcap)
    if first_key + tokens - 1 > low or first_key <= high - problem.window:
        mask(logits, tokens, panel, first_key - item.position, first_row, group, problem.window)
    softmax(logits, result.maxima + 4 * first_row, result.sums + 4 * first_row, buffers.decay, tokens, panel)
    output = result.output + 4 * first_row * v_pad
    accumulate(output, logits, buffers.values, buffers.decay, last_row + 1 - first_row, tokens, panel, v_pad)


@jit
def _load_queries(problem: Problem, item: Item, buffers: Buffers, rows: int, panel: int) -> None:
    """Scale the item's queries and lay them into panels; rows and dims past the last are zero."""
    group = problem.heads // problem.kv_heads
    scale, k_pad = float_of(problem.scale), padded(problem.k_dim)
    row_stride, dim_stride = (4 * k_pad, 4) if panel == 8 else (4, 4 * panel)
    for row in range((rows + panel - 1) // panel * panel):
        target = buffers.queries + 4 * k_pad * (row // panel * panel) + row % panel * row_stride
        dims = 0
        if row < rows:
            dims = problem.k_dim
            token, head = item.first + row // group, item.kv_head * group + row % group
            source = problem.query + token * problem.query_token_stride + head * problem.query_head_stride
            widen_rows(buffers.line, 0, source, 0, 1, dims, problem.query_element)
        for d in range(dims):
            store_float(target + d * dim_stride, load_float(buffers.line + 4 * d) * scale)
        for d in range(dims, k_pad):
            store_float(target + d * dim_stride, 0.0)


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
    """Gather the tile's keys and values as float32."""
    size, element = problem.block_size, problem.cache_element
    key_line, value_line = 4 * padded(problem.k_dim), 4 * padded(problem.v_dim)
    end = first_key + tokens
    for block in range(first_key // size, (end - 1) // size + 1):
        begin, past = max(first_key, block * size), min(end, (block + 1) * size)
        at = begin - first_key
        key, value = _cached(problem, item, block, begin - block * size)
        target = buffers.keys + at * key_line
        widen_rows(target, key_line, key, problem.key_token_stride, past - begin, problem.k_dim, element)
        target = buffers.values + at * value_line
        widen_rows(target, value_line, value, problem.value_token_stride, past - begin, problem.v_dim, element)


@jit
def _look_ahead(problem: Problem, item: Item, buffers: Buffers, first_key: int) -> Ahead:
    """Where the keys and values of a tile lie that begins at first_key."""
    size, end = problem.block_size, min(first_key + TILE_KEYS, item.end)
    at = buffers.ahead
    for block in range(first_key // size, (end - 1) // size + 1):
        begin, past = max(first_key, block * size), min(end, (block + 1) * size)
        key, value = _cached(problem, item, block, begin - block * size)
        for _ in range(begin, past):
            store_int64(at, key)
            store_int64(at + 8, value)
            at, key, value = at + 16, key + problem.key_token_stride, value + problem.value_token_stride
    width = 4 if problem.cache_element == FLOAT32 else 2
    return Ahead(buffers.ahead, max(end - first_key, 0), width * problem.k_dim, width * problem.v_dim)


@jit
def _cached(problem: Problem, item: Item, block: int, offset: int) -> tuple[int, int]:
    """The addresses of one token's key and value, at an offset in the sequence's block."""
    block_id = load_int32(problem.block_table + item.sequence * problem.block_table_stride + 4 * block)
    key = block_id * problem.key_block_stride + offset * problem.key_token_stride
    value = block_id * problem.value_block_stride + offset * problem.value_token_stride
    key_head, value_head = item.kv_head * problem.key_head_stride, item.kv_head * problem.value_head_stride
    return problem.key + key + key_head, problem.value + value + value_head

"""One tile of queries over one part of their sequence's keys: decode, prefill and verification alike.

A sequence's queries are rows: token after token, and of a token all heads that share a kv head (GQA packing). A tile is
BLOCK_M consecutive rows. Softmax is online, in powers of two (Milakov & Gimelshein 2018; Dao 2023, arXiv 2307.08691);
where the context is split, each part leaves its normalised output and log2 of its sum to `merge`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(
    tile, cu_seqlens_q, num_seqs, rows_above, rows_upto,
    group: tl.constexpr, BLOCK_M: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """(sequence, its first token, its number of rows, the tile's first row); the first row is past the rows: nothing.

    Sequence i's tiles begin at cu_seqlens_q[i] * group // BLOCK_M + i: enough for all, whatever the lengths are.
    Without SEARCH a sequence is a tile. Sequences with other than (rows_above, rows_upto] rows have none.
    """
    sequence = tile
    first_row = 0
    if SEARCH:
        begun = 0
        for start in range(0, num_seqs, 128):
            index = start + tl.arange(0, 128)
            first = tl.load(cu_seqlens_q + index, mask=index < num_seqs, other=0) * group // BLOCK_M + index
            begun += tl.sum(((first <= tile) & (index < num_seqs)).to(tl.int32), axis=0)
        sequence = begun - 1
    token = tl.load(cu_seqlens_q + sequence)
    rows = (tl.load(cu_seqlens_q + sequence + 1) - token) * group
    if SEARCH:
        first_row = (tile - (token * group // BLOCK_M + sequence)) * BLOCK_M
    rows = tl.where((rows > rows_above) & (rows <= rows_upto), rows, 0)
    return sequence, token, rows, first_row


@triton.jit
def key_tiles(
    seq_len, rows, first_row, splits, window,
    group: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """What a tile of queries sees: (first position, last position, first key, first tile of keys, past the last, tiles
    of keys in each split)."""
    tokens = rows // group
    first = seq_len - tokens + first_row // group
    last = seq_len - tokens + (tl.minimum(first_row + BLOCK_M, rows) - 1) // group
    first_key = 0
    if HAS_WINDOW:
        first_key = tl.maximum(first - window + 1, 0)
    begin = first_key // BLOCK_N
    end = (last + BLOCK_N) // BLOCK_N
    each = tl.maximum((end - begin + splits - 1) // splits, 1)
    return first, last, first_key, begin, end, each


@triton.jit
def _load_rows(
    rows, column, inside, dim: tl.constexpr, begin: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Columns [begin, begin + WIDTH) of keys or values; zeros beyond dim and, if MASKED, where not inside."""
    pointers = rows[:, None] + column[None, :]
    if MASKED and begin + WIDTH > dim:
        tile = tl.load(pointers, mask=inside[:, None] & (column < dim)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    elif begin + WIDTH > dim:
        tile = tl.load(pointers, mask=(column < dim)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _attend_keys(
    acc, top, total, q, q_rest, begin, end, first_key, last, position, scale, softcap, window,
    table, k_cache, v_cache, k_block, k_token, v_block, v_token,
    block_size: tl.constexpr, k_dim: tl.constexpr, v_dim: tl.constexpr,
    BLOCK_N: tl.constexpr, K_DIM: tl.constexpr, K_REST: tl.constexpr, V_DIM: tl.constexpr,
    MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add tiles of keys [begin, end) to the softmax. Without MASKED every query sees every key of them."""
    for tile in range(begin, end):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (key >= first_key) & (key <= last)
        if MASKED:
            block = tl.load(table + key // block_size, mask=inside, other=0).to(tl.int64)
        else:
            block = tl.load(table + key // block_size).to(tl.int64)
        k_rows = k_cache + block * k_block + key % block_size * k_token
        v_rows = v_cache + block * v_block + key % block_size * v_token
        k = _load_rows(k_rows, tl.arange(0, K_DIM), inside, k_dim, 0, K_DIM, MASKED).to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if K_REST > 0:
            column = K_DIM + tl.arange(0, K_REST)
            k_rest = _load_rows(k_rows, column, inside, k_dim, K_DIM, K_REST, MASKED).to(q.dtype)
            logits = tl.dot(q_rest, tl.trans(k_rest), logits, input_precision=PRECISION)
        v = _load_rows(v_rows, tl.arange(0, V_DIM), inside, v_dim, 0, V_DIM, MASKED).to(q.dtype)
        logits = logits * scale
        if HAS_SOFTCAP:
            # tanh; logits and softcap are in powers of two, hence 2 * log2(e)
            logits = softcap - 2.0 * softcap / (tl.exp2(logits * (2.8853900817779268 / softcap)) + 1.0)
        if MASKED:
            visible = inside[None, :] & (key[None, :] <= position[:, None])
            if HAS_WINDOW:
                visible = visible & (key[None, :] > position[:, None] - window)
            logits = tl.where(visible, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row may have seen nothing yet
        weights = tl.exp2(logits - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(
    do_not_specialize=["num_seqs", "rows_above", "rows_upto", "splits", "window", "table_row", "softcap", "scale"]
)
def attend_kernel(
    query, k_cache, v_cache, output, partials, sums, block_table, seq_lens, cu_seqlens_q, sinks, k_scale, v_scale,
    q_token, q_head, q_column, k_block, k_token, k_head, v_block, v_token, v_head, table_row,
    num_seqs, rows_above, rows_upto, splits, window, scale, softcap,
    heads: tl.constexpr, group: tl.constexpr, block_size: tl.constexpr, k_dim: tl.constexpr, v_dim: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, K_DIM: tl.constexpr, K_REST: tl.constexpr, V_DIM: tl.constexpr,
    SEARCH: tl.constexpr, SPLIT: tl.constexpr, PHASES: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, SCALES: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grid: (tiles, kv heads, splits), the last tiles, which see the most keys, first.

    partials: [tiles, kv heads, splits, BLOCK_M, V_DIM] float32, sums: the same without the last; written if SPLIT
    scale: of logits, in powers of two like softcap; SCALES: 0 no k_scale and v_scale, 1 one each, 2 one a kv head
    PHASES: keys that every query of the tile sees need no masks
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence, token, rows, first_row = find_tile(
        tile, cu_seqlens_q, num_seqs, rows_above, rows_upto, group, BLOCK_M, SEARCH
    )
    if first_row < rows:
        seq_len = tl.load(seq_lens + sequence)
        first, last, first_key, begin, end, each = key_tiles(
            seq_len, rows, first_row, splits, window, group, BLOCK_M, BLOCK_N, HAS_WINDOW
        )
        begin += split * each
        if (begin < end) | (split == 0):
            end = tl.minimum(begin + each, end)
            row = first_row + tl.arange(0, BLOCK_M)
            valid = row < rows
            head = kv_head * group + row % group
            position = seq_len - rows // group + row // group
            queries = query + (token + row // group).to(tl.int64) * q_token + head * q_head
            column = tl.arange(0, K_DIM)
            inside = valid[:, None] & (column < k_dim)[None, :]
            q = tl.load(queries[:, None] + column[None, :] * q_column, mask=inside, other=0.0).to(COMPUTE)
            q_rest = q
            if K_REST > 0:
                column = K_DIM + tl.arange(0, K_REST)
                inside = valid[:, None] & (column < k_dim)[None, :]
                q_rest = tl.load(queries[:, None] + column[None, :] * q_column, mask=inside, other=0.0).to(COMPUTE)
            if SCALES > 0:
                scale *= tl.load(k_scale + (kv_head if SCALES == 2 else 0))
            acc = tl.zeros((BLOCK_M, V_DIM), dtype=tl.float32)
            top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK_M,), dtype=tl.float32)
            if HAS_SINKS:
                sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
                top = tl.where(split == 0, sink, top)
                total = tl.where(split == 0, 1.0, total)
            k_cache += kv_head * k_head
            v_cache += kv_head * v_head
            table = block_table + sequence.to(tl.int64) * table_row
            full_begin = end
            full_end = end
            if PHASES:
                full_begin = begin
                if HAS_WINDOW:
                    full_begin = (tl.maximum(last - window + 1, 0) + BLOCK_N - 1) // BLOCK_N
                    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
                full_end = tl.maximum(tl.minimum((first + 1) // BLOCK_N, end), full_begin)
                if HAS_WINDOW:
                    acc, top, total = _attend_keys(
                        acc, top, total, q, q_rest, begin, full_begin, first_key, last, position, scale, softcap,
                        window, table, k_cache, v_cache, k_block, k_token, v_block, v_token, block_size, k_dim, v_dim,
                        BLOCK_N, K_DIM, K_REST, V_DIM, True, HAS_SOFTCAP, HAS_WINDOW, PRECISION,
                    )  # fmt: skip
                acc, top, total = _attend_keys(
                    acc, top, total, q, q_rest, full_begin, full_end, first_key, last, position, scale, softcap,
                    window, table, k_cache, v_cache, k_block, k_token, v_block, v_token, block_size, k_dim, v_dim,
                    BLOCK_N, K_DIM, K_REST, V_DIM, False, HAS_SOFTCAP, HAS_WINDOW, PRECISION,
                )  # fmt: skip
            else:
                full_end = begin
            acc, top, total = _attend_keys(
                acc, top, total, q, q_rest, full_end, end, first_key, last, position, scale, softcap,
                window, table, k_cache, v_cache, k_block, k_token, v_block, v_token, block_size, k_dim, v_dim,
                BLOCK_N, K_DIM, K_REST, V_DIM, True, HAS_SOFTCAP, HAS_WINDOW, PRECISION,
            )  # fmt: skip
            acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            if SCALES > 0:
                acc *= tl.load(v_scale + (kv_head if SCALES == 2 else 0))
            column = tl.arange(0, V_DIM)
            if SPLIT:
                place = ((tile * tl.num_programs(1) + kv_head) * splits + split).to(tl.int64) * BLOCK_M
                place += tl.arange(0, BLOCK_M)
                tl.store(sums + place, tl.where(total == 0.0, float("-inf"), top + tl.log2(total)))
                tl.store(partials + place[:, None] * V_DIM + column[None, :], acc)
            else:
                outputs = output + ((token + row // group).to(tl.int64) * heads + head) * v_dim
                inside = valid[:, None] & (column < v_dim)[None, :]
                tl.store(outputs[:, None] + column[None, :], acc.to(output.dtype.element_ty), mask=inside)

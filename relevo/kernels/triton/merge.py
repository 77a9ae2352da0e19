"""The parts of a context that was split become one output: each weighted by its share of the softmax's sum."""

from __future__ import annotations

import triton
import triton.language as tl

from relevo.kernels.triton.attend import find_tile, key_tiles


@triton.jit(do_not_specialize=["num_seqs", "rows_above", "rows_upto", "splits", "window"])
def merge_kernel(
    partials, sums, output, seq_lens, cu_seqlens_q, num_seqs, rows_above, rows_upto, splits, window,
    heads: tl.constexpr, group: tl.constexpr, v_dim: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, V_DIM: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    SEARCH: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """grid: (tiles, kv heads, rows of a tile); partials, sums and the rest: as `attend_kernel` has them."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence, token, rows, first_row = find_tile(
        tile, cu_seqlens_q, num_seqs, rows_above, rows_upto, group, BLOCK_M, SEARCH
    )
    row = first_row + tl.program_id(2)
    if row < rows:
        seq_len = tl.load(seq_lens + sequence)
        _first, _last, _key, begin, end, each = key_tiles(
            seq_len, rows, first_row, splits, window, group, BLOCK_M, BLOCK_N, HAS_WINDOW
        )
        split = tl.arange(0, SPLITS)
        used = (split == 0) | (split < (end - begin + each - 1) // each)
        place = ((tile * tl.num_programs(1) + kv_head) * splits + split).to(tl.int64) * BLOCK_M + tl.program_id(2)
        logs = tl.load(sums + place, mask=used, other=float("-inf"))
        top = tl.max(logs, axis=0)
        weights = tl.exp2(logs - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weights, axis=0)
        weights = weights / tl.where(total == 0.0, 1.0, total)
        head = kv_head * group + row % group
        target = output + ((token + row // group).to(tl.int64) * heads + head) * v_dim
        for start in tl.static_range(0, V_DIM, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            part = tl.load(partials + place[:, None] * V_DIM + column[None, :], mask=used[:, None], other=0.0)
            merged = tl.sum(part * weights[:, None], axis=0)
            tl.store(target + column, merged.to(output.dtype.element_ty), mask=column < v_dim)

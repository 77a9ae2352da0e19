"""Paged attention as Python calls it: which tiles, how many splits, one launch for each kind of sequence.

Grids depend on shapes and on metadata's host integers alone, and nothing waits for the device: fit for CUDA graphs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from relevo.kernels import reference
from relevo.kernels.metadata import AttentionMetadata
from relevo.kernels.triton.attend import attend_kernel
from relevo.kernels.triton.launch import FLOATS, FP8
from relevo.kernels.triton.merge import merge_kernel
from relevo.kernels.triton.tiles import MAX_PACKED_ROWS, Tile, long_tile, num_splits, packed_tile

LOG2_E = math.log2(math.e)
ALL_ROWS = 2**31 - 1
DRAFTS_BESIDE_PROMPTS = 8  # so many tokens of a sequence, at most, are verified as one tile in a batch with prompts

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class _Call:
    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    output: Tensor
    metadata: AttentionMetadata
    compute: torch.dtype
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.k_cache.shape[2]


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """See `Kernels.paged_attention`. Multiplies in the query's dtype, or in float32 if the cache has another."""
    if query.dtype not in FLOATS or k_cache.dtype not in (*FLOATS, FP8) or v_cache.dtype != k_cache.dtype:
        return reference.paged_attention(
            query, k_cache, v_cache, metadata, scale=scale, sliding_window=sliding_window, softcap=softcap,
            sinks=sinks, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
    num_tokens, heads, k_dim = query.shape
    _, block_size, kv_heads, v_dim = v_cache.shape
    assert heads % kv_heads == 0, (heads, kv_heads)
    assert k_cache.shape == (len(v_cache), block_size, kv_heads, k_dim), (k_cache.shape, query.shape, v_cache.shape)
    assert k_cache.stride(3) == v_cache.stride(3) == 1, (k_cache.stride(), v_cache.stride())
    assert metadata.block_table.stride(1) == 1, metadata.block_table.stride()
    assert (k_scale is None) == (v_scale is None)
    output = torch.empty(num_tokens, heads, v_dim, dtype=query.dtype, device=query.device)
    num_seqs = len(metadata.seq_lens)
    if num_tokens == 0 or num_seqs == 0:
        return output
    compute = query.dtype if k_cache.dtype in (query.dtype, FP8) else torch.float32
    call = _Call(
        query, k_cache, v_cache, output, metadata, compute, scale, sliding_window, softcap, sinks, k_scale, v_scale
    )
    dims, itemsize = sum(_padded_dims(k_dim)) + _padded(v_dim), compute.itemsize
    group = call.group
    rows = metadata.max_query_len * group
    if rows <= MAX_PACKED_ROWS:
        _attend(call, packed_tile(rows, dims, itemsize), 0, ALL_ROWS, packed=True)
        return output
    short = min(MAX_PACKED_ROWS, max(16, triton.next_power_of_2(group * DRAFTS_BESIDE_PROMPTS)))
    beside = num_seqs > 1 and num_tokens > metadata.max_query_len and group <= short
    if beside:
        _attend(call, packed_tile(short, dims, itemsize), 0, short, packed=True)
    _attend(call, long_tile(dims, itemsize), short if beside else 0, ALL_ROWS, packed=False)
    return output


def _attend(call: _Call, tile: Tile, rows_above: int, rows_upto: int, *, packed: bool) -> None:
    """Sequences of (rows_above, rows_upto] rows. packed: each is one tile."""
    query, metadata, group = call.query, call.metadata, call.group
    num_tokens, heads, k_dim = query.shape
    _, block_size, kv_heads, v_dim = call.v_cache.shape
    num_seqs = len(metadata.seq_lens)
    tiles = num_seqs if packed else num_tokens * group // tile.block_m + num_seqs
    window = call.window
    max_keys = metadata.max_seq_len if window is None else min(metadata.max_seq_len, window + metadata.max_query_len)
    splits = num_splits(tiles * kv_heads, max_keys, query.device)
    k_main, k_rest = _padded_dims(k_dim)
    v_padded = _padded(v_dim)
    partials = sums = call.output  # not written
    if splits > 1:
        shape = (tiles, kv_heads, splits, tile.block_m)
        partials = torch.empty(*shape, v_padded, dtype=torch.float32, device=query.device)
        sums = torch.empty(shape, dtype=torch.float32, device=query.device)
    k_scale, v_scale = call.k_scale, call.v_scale
    shared = {
        "heads": heads, "group": group, "v_dim": v_dim, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "V_DIM": v_padded, "SEARCH": not packed, "HAS_WINDOW": window is not None,
    }  # fmt: skip
    attend_kernel[(tiles, kv_heads, splits)](
        query, call.k_cache, call.v_cache, call.output, partials, sums, metadata.block_table, metadata.seq_lens,
        metadata.cu_seqlens_q, query if call.sinks is None else call.sinks, query if k_scale is None else k_scale,
        query if v_scale is None else v_scale, *query.stride(), *call.k_cache.stride()[:3], *call.v_cache.stride()[:3],
        metadata.block_table.stride(0), num_seqs, rows_above, rows_upto, splits, window or 0,
        call.scale * LOG2_E, 0.0 if call.softcap is None else call.softcap * LOG2_E,
        block_size=block_size, k_dim=k_dim, K_DIM=k_main, K_REST=k_rest, SPLIT=splits > 1, PHASES=not packed,
        HAS_SOFTCAP=call.softcap is not None, HAS_SINKS=call.sinks is not None,
        SCALES=0 if k_scale is None else 2 if k_scale.numel() > 1 else 1,
        COMPUTE=_TYPES[call.compute], PRECISION="ieee" if call.compute == torch.float32 else "tf32",
        num_warps=tile.num_warps, num_stages=tile.num_stages, **shared,
    )  # fmt: skip
    if splits > 1:
        splits_padded = triton.next_power_of_2(splits)
        merge_kernel[(tiles, kv_heads, min(tile.block_m, metadata.max_query_len * group))](
            partials, sums, call.output, metadata.seq_lens, metadata.cu_seqlens_q, num_seqs, rows_above, rows_upto,
            splits, window or 0, SPLITS=splits_padded, COLUMNS=min(v_padded, max(16, 8192 // splits_padded)), **shared,
        )  # fmt: skip


def _padded(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


def _padded_dims(dim: int) -> tuple[int, int]:
    """A power of two that is a part of dim, and one for what remains: 576 is 512 + 64."""
    padded = _padded(dim)
    if padded == dim or padded == 16:
        return padded, 0
    return padded // 2, _padded(dim - padded // 2)

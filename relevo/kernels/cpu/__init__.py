"""Paged attention for the CPU, compiled by numba: a batch is cut into items of work (`plan`), threads take them one
after another (`attention`), and each streams over tiles of keys in float32 vectors (`tile`, `simd`).

Threads are torch's own, and as many as torch.get_num_threads(): see `openmp` for why not numba's.

dtypes: float32, bfloat16 and float16, for queries and cache independently; others go to `reference`.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from relevo.kernels import reference
from relevo.kernels.cpu.attention import build_worker
from relevo.kernels.cpu.jit import CFunction
from relevo.kernels.cpu.openmp import run_on_threads
from relevo.kernels.cpu.plan import plan
from relevo.kernels.cpu.records import PROBLEM, WORK, Problem
from relevo.kernels.cpu.simd import BFLOAT16, FLOAT16, FLOAT32
from relevo.kernels.cpu.store import Lines, scatter
from relevo.kernels.metadata import AttentionMetadata
from relevo.kernels.reference import (
    add_rms_norm,
    argmax,
    gated_activation,
    prepare_linear,
    rms_norm,
    rotary_store_kv,
    top_k,
)

__all__ = [
    "add_rms_norm",
    "argmax",
    "gated_activation",
    "paged_attention",
    "prepare_linear",
    "rms_norm",
    "rotary_store_kv",
    "store_kv",
    "top_k",
    "warm_up",
]

ELEMENTS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
NO_WINDOW = 1 << 40


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write a step's keys and values into the cache; see `Kernels.store_kv`."""
    num_blocks, block_size, kv_heads, _ = k_cache.shape
    num_tokens = slot_mapping.shape[0]
    assert key.shape == (num_tokens, *k_cache.shape[2:]), (key.shape, k_cache.shape, num_tokens)
    assert value.shape == (num_tokens, *v_cache.shape[2:]), (value.shape, v_cache.shape, num_tokens)
    assert v_cache.shape[:3] == k_cache.shape[:3], (k_cache.shape, v_cache.shape)
    assert slot_mapping.dtype == torch.int64, slot_mapping.dtype
    key, value = _dense_rows(key.to(k_cache.dtype)), _dense_rows(value.to(v_cache.dtype))
    slots = slot_mapping.contiguous()
    key_lines, value_lines = _lines(key, k_cache), _lines(value, v_cache)
    scatter(key_lines, value_lines, slots.data_ptr(), num_tokens, num_blocks, block_size, kv_heads)


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
) -> Tensor:
    """Causal attention over the paged cache; see `Kernels.paged_attention`.

    Raises IndexError if a block that would be read is not in the block table, or not in the cache.
    """
    if query.dtype not in ELEMENTS or k_cache.dtype not in ELEMENTS or v_cache.dtype != k_cache.dtype:
        return reference.paged_attention(
            query, k_cache, v_cache, metadata, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
        )
    num_tokens, heads, k_dim = query.shape
    num_blocks, block_size, kv_heads, v_dim = v_cache.shape
    assert heads % kv_heads == 0, (heads, kv_heads)
    assert k_cache.shape == (num_blocks, block_size, kv_heads, k_dim), (k_cache.shape, query.shape, v_cache.shape)
    assert k_cache.stride(3) == v_cache.stride(3) == 1, (k_cache.stride(), v_cache.stride())
    # These names also keep the memory alive whose addresses go into the problem.
    query = _dense_rows(query)
    block_table = metadata.block_table.contiguous()
    seq_lens, cu_seqlens_q = metadata.seq_lens.contiguous(), metadata.cu_seqlens_q.contiguous()
    assert block_table.dtype == seq_lens.dtype == cu_seqlens_q.dtype == torch.int32
    if sinks is not None:
        sinks = sinks.float().contiguous()
    output = torch.empty(num_tokens, heads, v_dim, dtype=query.dtype)
    query_bytes, cache_bytes = query.element_size(), k_cache.element_size()
    key_strides, value_strides = k_cache.stride(), v_cache.stride()
    problem = Problem(
        query=query.data_ptr(),
        key=k_cache.data_ptr(),
        value=v_cache.data_ptr(),
        output=output.data_ptr(),
        block_table=block_table.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        cu_seqlens_q=cu_seqlens_q.data_ptr(),
        sinks=0 if sinks is None else sinks.data_ptr(),
        query_token_stride=query.stride(0) * query_bytes,
        query_head_stride=query.stride(1) * query_bytes,
        key_block_stride=key_strides[0] * cache_bytes,
        key_token_stride=key_strides[1] * cache_bytes,
        key_head_stride=key_strides[2] * cache_bytes,
        value_block_stride=value_strides[0] * cache_bytes,
        value_token_stride=value_strides[1] * cache_bytes,
        value_head_stride=value_strides[2] * cache_bytes,
        block_table_stride=block_table.shape[1] * block_table.element_size(),
        query_element=ELEMENTS[query.dtype],
        cache_element=ELEMENTS[k_cache.dtype],
        num_seqs=seq_lens.shape[0],
        max_blocks=block_table.shape[1],
        num_blocks=num_blocks,
        block_size=block_size,
        heads=heads,
        kv_heads=kv_heads,
        k_dim=k_dim,
        v_dim=v_dim,
        window=NO_WINDOW if sliding_window is None else sliding_window,
        workers=torch.get_num_threads(),
        scale=float(scale),
        softcap=0.0 if softcap is None else float(softcap),
    )
    _attend(problem)
    return output


def warm_up(dtype: torch.dtype) -> None:
    """Compile both entry points, or load them from disk, and start the threads; one compilation serves every dtype."""
    dtype = dtype if dtype in ELEMENTS else torch.float32
    cache = torch.zeros(1, 1, 1, 16, dtype=dtype)
    token = torch.zeros(1, 1, 16, dtype=dtype)
    slot, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    bounds, table = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    store_kv(token, token, cache, cache, slot)
    paged_attention(token, cache, cache, AttentionMetadata(table, slot, one, bounds, 1, 1), scale=1.0)


def _attend(problem: Problem) -> None:
    """Plan, allocate, and work on all threads; the caller keeps alive what the problem points at."""
    packed = ctypes.create_string_buffer(PROBLEM.pack(*problem), PROBLEM.size)
    items, groups, scratch_size, results_size = plan(ctypes.addressof(packed))
    counters = torch.zeros(2 + groups, dtype=torch.int64)
    scratch = torch.empty(scratch_size, dtype=torch.float32)
    results = torch.empty(results_size, dtype=torch.float32)
    addresses = (ctypes.addressof(packed), items.ctypes.data, len(items))
    work = WORK.pack(*addresses, counters.data_ptr(), scratch.data_ptr(), results.data_ptr())
    run_on_threads(_worker().address, work, problem.workers)


@cache
def _worker() -> CFunction:
    return build_worker()


def _dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _lines(source: Tensor, cache: Tensor) -> Lines:
    assert cache.stride(3) == 1, cache.stride()
    size, strides = cache.element_size(), cache.stride()
    return Lines(
        source.data_ptr(),
        source.stride(0) * size,
        source.stride(1) * size,
        cache.data_ptr(),
        strides[0] * size,
        strides[1] * size,
        strides[2] * size,
        cache.shape[3] * size,
    )

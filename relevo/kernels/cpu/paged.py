"""Paged attention as Python calls it: one plan a step for all layers of a kind; then little more than addresses."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from relevo.kernels import reference
from relevo.kernels.cpu.attention import build_worker
from relevo.kernels.cpu.calls import scratch
from relevo.kernels.cpu.jit import CFunction
from relevo.kernels.cpu.openmp import run_on_threads
from relevo.kernels.cpu.plan import Items, plan
from relevo.kernels.cpu.records import OWN, SHARED, WORK
from relevo.kernels.cpu.simd import ELEMENTS
from relevo.kernels.metadata import AttentionMetadata

NO_WINDOW = 1 << 40
WORTH_THREADS = 1 << 18  # multiplications; below, one thread is done before others would have begun

_PROBLEM_BYTES = OWN.size + SHARED.size


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all layers of a kind share in one step. shared: a Problem's fields, packed."""

    shared: bytes
    items: Items
    items_address: int
    num_items: int
    counter_bytes: int
    scratch_bytes: int
    total_bytes: int
    workers: int
    keeps_alive: tuple[Tensor, ...]  # whose addresses are in `shared`


class _Records(threading.local):
    """A thread's Problem, and the Work that points at it."""

    def __init__(self) -> None:
        self.buffer = bytearray(_PROBLEM_BYTES + WORK.size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))


_records = _Records()


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
    """Causal attention over the paged cache; see `Kernels.paged_attention`.

    Raises IndexError if a block that would be read is not in the block table, or not in the cache.
    """
    if query.dtype not in ELEMENTS or k_cache.dtype not in ELEMENTS or v_cache.dtype != k_cache.dtype:
        return reference.paged_attention(
            query, k_cache, v_cache, metadata, scale=scale, sliding_window=sliding_window, softcap=softcap,
            sinks=sinks, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
    if query.stride(-1) != 1:
        query = query.contiguous()
    kind = (
        query.shape,
        query.stride(),
        query.dtype,
        k_cache.shape,
        k_cache.stride(),
        k_cache.dtype,
        v_cache.shape,
        v_cache.stride(),
        sliding_window,
        torch.get_num_threads(),
    )
    planned: _Plan | None = metadata.plans.get(kind)
    if planned is None:
        planned = metadata.plans[kind] = _make_plan(query, k_cache, v_cache, metadata, sliding_window)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    output = query.new_empty(*query.shape[:2], v_cache.shape[3])
    records = _records
    buffer, address = records.buffer, records.address
    OWN.pack_into(
        buffer,
        0,
        query.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        output.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        scale,
        0.0 if softcap is None else softcap,
    )
    buffer[OWN.size : _PROBLEM_BYTES] = planned.shared
    counters = scratch(planned.total_bytes)
    ctypes.memset(counters, 0, planned.counter_bytes)
    memory = counters + planned.counter_bytes
    results = memory + planned.scratch_bytes
    work = (address, planned.items_address, planned.num_items, counters, memory, results)
    WORK.pack_into(buffer, _PROBLEM_BYTES, *work)
    run_on_threads(compile().address, address + _PROBLEM_BYTES, planned.workers)
    return output


def compile() -> CFunction:
    """Compile, or load from disk, unless that has happened."""
    if not _compiled:
        _compiled.append(build_worker())
    return _compiled[0]


_compiled: list[CFunction] = []


def _make_plan(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata, sliding_window: int | None
) -> _Plan:
    """Check the call and cut the batch into items."""
    _, heads, k_dim = query.shape
    num_blocks, block_size, kv_heads, v_dim = v_cache.shape
    assert heads % kv_heads == 0, (heads, kv_heads)
    assert k_cache.shape == (num_blocks, block_size, kv_heads, k_dim), (k_cache.shape, query.shape, v_cache.shape)
    assert k_cache.stride(3) == v_cache.stride(3) == 1, (k_cache.stride(), v_cache.stride())
    block_table = metadata.block_table.contiguous()
    seq_lens, cu_seqlens_q = metadata.seq_lens.contiguous(), metadata.cu_seqlens_q.contiguous()
    assert block_table.dtype == seq_lens.dtype == cu_seqlens_q.dtype == torch.int32
    size, cache_size = query.element_size(), k_cache.element_size()
    workers = torch.get_num_threads()
    shared = SHARED.pack(
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        cu_seqlens_q.data_ptr(),
        *(stride * size for stride in query.stride()[:2]),
        *(stride * cache_size for stride in (*k_cache.stride()[:3], *v_cache.stride()[:3])),
        block_table.shape[1] * block_table.element_size(),
        ELEMENTS[query.dtype],
        ELEMENTS[k_cache.dtype],
        seq_lens.shape[0],
        block_table.shape[1],
        num_blocks,
        block_size,
        heads,
        kv_heads,
        k_dim,
        v_dim,
        NO_WINDOW if sliding_window is None else sliding_window,
        workers,
    )
    problem = ctypes.create_string_buffer(bytes(OWN.size) + shared, _PROBLEM_BYTES)
    items, groups, scratch_floats, result_floats, cost = plan(ctypes.addressof(problem))
    counter_bytes = -(-8 * (2 + groups) // 64) * 64
    scratch_bytes = -(-4 * scratch_floats // 64) * 64
    if cost * (k_dim + v_dim) < WORTH_THREADS:
        workers = 1
    return _Plan(
        shared=shared,
        items=items,
        items_address=items.ctypes.data,
        num_items=len(items),
        counter_bytes=counter_bytes,
        scratch_bytes=scratch_bytes,
        total_bytes=counter_bytes + scratch_bytes + 4 * result_floats,
        workers=max(1, min(workers, len(items))),
        keeps_alive=(block_table, seq_lens, cu_seqlens_q),
    )

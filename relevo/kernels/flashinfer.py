"""Triton's kernels, but attention by FlashInfer where the host knows the lengths: 16 bits, K like V, no sinks.

FlashInfer divides a batch's work on the host, in `plan`: once a step for all layers of a kind. A CUDA graph's lengths
are not known when it is captured, so that decode steps are left to Triton, which plans nothing.

`plan` waits for the device if it gets tensors of the device, or has to copy pageable memory; so it gets pinned memory,
lengths of sequences included, which it would make of the rest otherwise. None of this has run on a GPU yet: tests hold
the calls to FlashInfer's documentation, by a stand-in. Read for it: version 0.6.18, flashinfer/prefill.py,
csrc/batch_prefill*.cu and include/flashinfer/attention/scheduler.cuh.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import cycle
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relevo.kernels import triton
from relevo.kernels.metadata import AttentionMetadata, HostBatch
from relevo.kernels.triton import *  # noqa: F403 - all but attention
from relevo.kernels.triton.tiles import num_multiprocessors

HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (16, 32, 64)
WORKSPACE_BYTES = 128 << 20  # what its documentation recommends; at least
TILE_ROWS = 128  # at most, whose partial results a split keeps in the workspace

# Engines of one process share planners. All launch on the same stream, so that their kernels share workspaces.
_lock = Lock()


class _Kind(NamedTuple):
    """What a plan is made for, beyond the batch. window_left: keys before a query's own; -1 for all."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    scale: float
    window_left: int
    softcap: float


def paged_attention(  # type: ignore[no-redef]
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
    """See `Kernels.paged_attention`."""
    if metadata.host is None or sinks is not None or not _suits(query, k_cache, v_cache):
        return triton.paged_attention(
            query,
            k_cache,
            v_cache,
            metadata,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    _, block_size, kv_heads, head_dim = k_cache.shape
    window_left = -1 if sliding_window is None else sliding_window - 1
    kind = _Kind(query.shape[1], kv_heads, head_dim, block_size, query.dtype, scale, window_left, softcap or 0.0)
    query = query if query.stride(2) == 1 else query.contiguous()
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    with _lock:
        _planned(kind, metadata, metadata.host, query.device).run(query, (k_cache, v_cache), out=output)
    return output


def _suits(query: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    return (
        len(query) > 0
        and query.dtype == k_cache.dtype == v_cache.dtype
        and query.dtype in (torch.bfloat16, torch.float16)
        and k_cache.shape == v_cache.shape
        and k_cache.stride() == v_cache.stride()
        and k_cache.shape[1] in BLOCK_SIZES
        and k_cache.shape[3] in HEAD_DIMS
    )


def _planned(kind: _Kind, metadata: AttentionMetadata, host: HostBatch, device: torch.device) -> Any:
    """FlashInfer's wrapper with a plan for this batch: made by the first layer of its kind."""
    planner, number = metadata.plans.get(kind, (None, 0))
    if planner is None or planner.number != number:
        pages = metadata.plans.get(_Pages)
        if pages is None:
            pages = metadata.plans[_Pages] = _pages(host, kind.block_size, device)
        planner = next(_planners(kind, device))
        planner.plan(pages)
        metadata.plans[kind] = planner, planner.number
    return planner.wrapper


class _Pages(NamedTuple):
    """A batch as `plan` takes it: int32, in host memory but for the indices.

    kv_indptr: [num_seqs + 1]; sequence i's blocks are indices[kv_indptr[i]:kv_indptr[i + 1]]
    last_page_len: [num_seqs], tokens in a sequence's last block
    """

    qo_indptr: Tensor
    kv_indptr: Tensor
    indices: Tensor
    last_page_len: Tensor
    seq_lens: Tensor


def _pages(host: HostBatch, block_size: int, device: torch.device) -> _Pages:
    counts = -(-host.seq_lens // block_size)
    used = np.arange(host.block_table.shape[1]) < counts[:, None]
    return _Pages(
        _pinned(host.cu_seqlens_q, device),
        _pinned(np.concatenate(([0], np.cumsum(counts))), device),
        _pinned(host.block_table[used], device).to(device, non_blocking=True),
        _pinned((host.seq_lens - 1) % block_size + 1, device),
        _pinned(host.seq_lens, device),
    )


def _pinned(values: NDArray[Any], device: torch.device) -> Tensor:
    """int32, in memory that is copied from behind whatever the device computes."""
    tensor = torch.from_numpy(values.astype(np.int32))
    return tensor.pin_memory() if device.type == "cuda" else tensor


class _Planner:
    """A wrapper of FlashInfer's, and the number of the plan that it has.

    `plan` writes to pinned memory of the wrapper's own and enqueues a copy of that. The next step is planned while this
    one may not have got there: so two planners of a kind take turns, and one waits until its last copy is through.
    """

    def __init__(self, kind: _Kind, device: torch.device) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self.wrapper = BatchPrefillWithPagedKVCacheWrapper(_workspace(_workspace_bytes(kind, device), device), "NHD")
        self.number = 0
        self._kind = kind
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def plan(self, pages: _Pages) -> None:
        kind = self._kind
        if self._copied is not None:
            self._copied.synchronize()
        self.number += 1
        self.wrapper.plan(
            pages.qo_indptr,
            pages.kv_indptr,
            pages.indices,
            pages.last_page_len,
            kind.heads,
            kind.kv_heads,
            kind.head_dim,
            kind.block_size,
            causal=True,
            sm_scale=kind.scale,
            window_left=kind.window_left,
            logits_soft_cap=kind.softcap,
            q_data_type=kind.dtype,
            kv_data_type=kind.dtype,
            seq_lens=pages.seq_lens,
        )
        if self._copied is not None:
            self._copied.record()


@cache
def _planners(kind: _Kind, device: torch.device) -> Iterator[_Planner]:
    with torch.inference_mode(False):  # else their buffers could only be written to in that mode
        return cycle([_Planner(kind, device), _Planner(kind, device)])


def _workspace_bytes(kind: _Kind, device: torch.device) -> int:
    """What a split context's partial results and their sums take at most: two tiles a multiprocessor, float32."""
    tiles = 2 * num_multiprocessors(device) // kind.kv_heads
    return max(WORKSPACE_BYTES, kind.heads * tiles * TILE_ROWS * (kind.head_dim + 1) * 4)


@cache
def _workspace(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)

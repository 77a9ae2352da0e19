"""Batches over a paged cache in which whatever must not be read is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relevo.core.block_hash import LayerShape
from relevo.kernels import AttentionMetadata
from relevo.kernels.metadata import HostBatch
from relevo.models.layout import KVLayout

LAYERS, LAYER = 3, 1  # of a block, and the one that is used
NAN_BYTE = 0xFF  # in every float type, float8_e4m3fn too


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's queries and metadata; keys and values of all context: `slots` says where in the cache they belong."""

    query: Tensor  # [num_tokens, heads, k_dim]
    keys: Tensor  # [num_context_tokens, kv_heads, k_dim]
    values: Tensor  # [num_context_tokens, kv_heads, v_dim]
    slots: Tensor  # [num_context_tokens] int64
    storage: Tensor
    k_cache: Tensor
    v_cache: Tensor
    metadata: AttentionMetadata


def make_batch(
    lens: Sequence[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    k_dim: int,
    v_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    device: torch.device,
) -> Batch:
    """lens: (tokens of context, queries among them) of each sequence; blocks lie in random order.

    As in an engine, the host's copy is there where a step is not launched as a graph: where there are prompts.
    """
    v_dim = k_dim if v_dim is None else v_dim
    layout = KVLayout((LayerShape(kv_heads, k_dim, v_dim),) * LAYERS, cache_dtype or dtype, block_size)
    counts = [-(-seq_len // block_size) for seq_len, _ in lens]
    storage = torch.full((sum(counts) + 3, layout.block_bytes), NAN_BYTE, dtype=torch.uint8, device=device)
    k_cache, v_cache = layout.views(storage)[LAYER]
    block_ids = torch.randperm(len(storage), device=device)
    block_table = torch.full((len(lens), max(counts) + 2), 2**31 - 1, dtype=torch.int32, device=device)
    slots, queries = [], []
    begin = 0
    for i, (seq_len, query_len) in enumerate(lens):
        own = block_ids[begin : begin + counts[i]]
        begin += counts[i]
        block_table[i, : counts[i]] = own.to(torch.int32)
        positions = torch.arange(seq_len, device=device)
        slots.append(own[positions // block_size] * block_size + positions % block_size)
        queries.append(slots[-1][seq_len - query_len :])
    query_lens = torch.tensor([0, *(query_len for _, query_len in lens)], device=device)
    cu_seqlens_q = query_lens.cumsum(0).to(torch.int32)
    seq_lens = torch.tensor([seq_len for seq_len, _ in lens], dtype=torch.int32, device=device)
    max_query_len = max(query_len for _, query_len in lens)
    on_host: list[NDArray[np.int32]] = [tensor.cpu().numpy() for tensor in (block_table, seq_lens, cu_seqlens_q)]
    num_context, num_tokens = sum(seq_len for seq_len, _ in lens), sum(query_len for _, query_len in lens)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    return Batch(
        query=random(num_tokens, heads, k_dim),
        keys=random(num_context, kv_heads, k_dim),
        values=random(num_context, kv_heads, v_dim),
        slots=torch.cat(slots),
        storage=storage,
        k_cache=k_cache,
        v_cache=v_cache,
        metadata=AttentionMetadata(
            block_table=block_table,
            slot_mapping=torch.cat(queries),
            seq_lens=seq_lens,
            cu_seqlens_q=cu_seqlens_q,
            max_query_len=max_query_len,
            max_seq_len=max(seq_len for seq_len, _ in lens),
            host=HostBatch(*on_host) if max_query_len > 1 else None,
        ),
    )

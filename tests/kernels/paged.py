"""Batches over a paged cache in which whatever must not be read is poison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relevo.kernels import AttentionMetadata

LAYERS, LAYER = 3, 1  # a block holds three layers; the tests use the middle one


@dataclass(frozen=True)
class Batch:
    """One step: queries, this step's keys and values, the cache they belong in, and each sequence's whole context."""

    query: Tensor
    key: Tensor
    value: Tensor
    storage: Tensor  # [num_blocks, block_elements]
    k_cache: Tensor
    v_cache: Tensor
    metadata: AttentionMetadata
    contexts: list[tuple[Tensor, Tensor]]  # each [seq_len, kv_heads, dim]
    query_lens: list[int]


def make_batch(
    lens: Sequence[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    k_dim: int = 64,
    v_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    sliding_window: int | None = None,
    seed: int = 0,
) -> Batch:
    """Sequences of (seq_len, query_len), their context in shuffled blocks, NaN everywhere else.

    Nowhere else: the other layers and blocks, the last blocks' tails, the slots that have left every query's
    window, and this step's own slots, which `store_kv` is to fill. The block table's padding names no block at all.
    """
    torch.manual_seed(seed)
    v_dim = k_dim if v_dim is None else v_dim
    counts = [-(-seq_len // block_size) for seq_len, _ in lens]
    num_blocks = sum(counts) + 3
    layer = block_size * kv_heads * (k_dim + v_dim)
    storage = torch.full((num_blocks, LAYERS * layer), float("nan"), dtype=dtype)
    k_cache, v_cache = layer_views(storage, block_size, kv_heads, k_dim, v_dim)
    free = torch.randperm(num_blocks).tolist()
    block_table = torch.full((len(lens), max(counts, default=0) + 2), 2**31 - 1, dtype=torch.int32)
    slots: list[int] = []
    contexts = []
    for i, (seq_len, query_len) in enumerate(lens):
        blocks = [free.pop() for _ in range(counts[i])]
        block_table[i, : counts[i]] = torch.tensor(blocks, dtype=torch.int32)
        own = [blocks[p // block_size] * block_size + p % block_size for p in range(seq_len)]
        key = torch.randn(seq_len, kv_heads, k_dim).to(dtype)
        value = torch.randn(seq_len, kv_heads, v_dim).to(dtype)
        computed = seq_len - query_len
        first_seen = 0 if sliding_window is None else max(0, computed - sliding_window + 1)
        for p in range(first_seen, computed):
            k_cache[own[p] // block_size, own[p] % block_size] = key[p]
            v_cache[own[p] // block_size, own[p] % block_size] = value[p]
        slots += own[computed:]
        contexts.append((key, value))
    query_lens = [query_len for _, query_len in lens]
    bounds = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    num_tokens = sum(query_lens)
    metadata = AttentionMetadata(
        block_table=block_table,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        seq_lens=torch.tensor([seq_len for seq_len, _ in lens], dtype=torch.int32),
        cu_seqlens_q=bounds,
        max_query_len=max(query_lens, default=0),
        max_seq_len=max((seq_len for seq_len, _ in lens), default=0),
    )
    new = [(k[len(k) - q :], v[len(v) - q :]) for (k, v), q in zip(contexts, query_lens, strict=True)]
    return Batch(
        # laid out as [heads, tokens, dim], the way transformers' attention modules have it
        query=torch.randn(heads, num_tokens, k_dim).to(dtype).transpose(0, 1),
        key=torch.cat([k for k, _ in new]),
        value=torch.cat([v for _, v in new]),
        storage=storage,
        k_cache=k_cache,
        v_cache=v_cache,
        metadata=metadata,
        contexts=contexts,
        query_lens=query_lens,
    )


def layer_views(storage: Tensor, block_size: int, kv_heads: int, k_dim: int, v_dim: int) -> tuple[Tensor, Tensor]:
    """One layer's K and V in a cache whose blocks are contiguous over all layers."""
    k_elements, v_elements = block_size * kv_heads * k_dim, block_size * kv_heads * v_dim
    begin = LAYER * (k_elements + v_elements)
    middle = begin + k_elements
    k_cache = storage[:, begin:middle].view(-1, block_size, kv_heads, k_dim)
    v_cache = storage[:, middle : middle + v_elements].view(-1, block_size, kv_heads, v_dim)
    return k_cache, v_cache


def dense_attention(
    batch: Batch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What attention is: in float64, one query at a time, from the contexts themselves. `exp` must not overflow."""
    rows: list[Tensor] = []
    query = batch.query.double()
    group = query.shape[1] // batch.k_cache.shape[2]
    for (key, value), query_len in zip(batch.contexts, batch.query_lens, strict=True):
        keys = key.double().repeat_interleave(group, dim=1)
        values = value.double().repeat_interleave(group, dim=1)
        for position in range(len(key) - query_len, len(key)):
            begin = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            logits = (keys[begin : position + 1] * query[len(rows)]).sum(-1) * scale
            if softcap is not None:
                logits = softcap * (logits / softcap).tanh()
            weights = logits.exp()
            total = weights.sum(0) + (0.0 if sinks is None else sinks.double().exp())
            rows.append((weights[..., None] * values[begin : position + 1]).sum(0) / total[:, None])
    return torch.stack(rows)

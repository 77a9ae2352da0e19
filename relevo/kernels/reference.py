"""The oracle: paged attention in plain torch, one sequence at a time, on any device.

Computes in float32, or in float64 where the query is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relevo.kernels.metadata import AttentionMetadata


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write a step's keys and values into the cache; see `Kernels.store_kv`."""
    block_size = k_cache.shape[1]
    block_ids, offsets = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block_ids, offsets] = key.to(k_cache.dtype)
    v_cache[block_ids, offsets] = value.to(v_cache.dtype)


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
    """Causal attention over the paged cache; see `Kernels.paged_attention`."""
    num_tokens, heads, _ = query.shape
    output = query.new_empty(num_tokens, heads, v_cache.shape[-1])
    bounds, seq_lens = metadata.cu_seqlens_q.tolist(), metadata.seq_lens.tolist()
    for i, seq_len in enumerate(seq_lens):
        # this step's tokens: [begin, end) of the batch, [seq_len - (end - begin), seq_len) of the sequence
        begin, end = bounds[i], bounds[i + 1]
        if begin == end:
            continue
        first_position = seq_len - (end - begin)
        first_key = 0 if sliding_window is None else max(0, first_position - sliding_window + 1)
        output[begin:end] = _attend(
            query[begin:end],
            _context(k_cache, metadata.block_table[i], first_key, seq_len),
            _context(v_cache, metadata.block_table[i], first_key, seq_len),
            _visible(first_position, first_key, seq_len, sliding_window, query.device),
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )
    return output


def warm_up(dtype: torch.dtype) -> None:
    """Nothing to compile."""


def _context(cache: Tensor, block_ids: Tensor, begin: int, end: int) -> Tensor:
    """Keys or values [begin, end) of one sequence: [end - begin, kv_heads, dim]."""
    block_size = cache.shape[1]
    positions = torch.arange(begin, end, device=cache.device)
    return cache[block_ids[positions // block_size].long(), positions % block_size]


def _visible(first_position: int, first_key: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys [first_key, end) the queries [first_position, end) see: bool [queries, keys]."""
    query_positions = torch.arange(first_position, end, device=device)[:, None]
    key_positions = torch.arange(first_key, end, device=device)
    visible = key_positions <= query_positions
    return visible if window is None else visible & (key_positions > query_positions - window)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence: [queries, heads, k_dim] over [keys, kv_heads, dim] gives [queries, heads, v_dim]."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    queries, heads, _ = query.shape
    groups = heads // key.shape[1]
    key = key.to(dtype).repeat_interleave(groups, dim=1)
    value = value.to(dtype).repeat_interleave(groups, dim=1)
    logits = torch.einsum("qhd,khd->hqk", query.to(dtype), key) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(dtype)[:, None, None].expand(heads, queries, 1)], dim=-1)
    weights = logits.softmax(dim=-1)[..., : key.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)

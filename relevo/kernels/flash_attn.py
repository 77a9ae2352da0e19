"""Triton's kernels, but attention by FlashAttention 3 where it can: a Hopper GPU, 16 bits, no sinks.

FlashAttention 2 is no alternative: its blocks are of 256 tokens. None of this has run on a GPU yet: tests hold the call
to its documentation, by a stand-in.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from relevo.kernels import triton
from relevo.kernels.metadata import AttentionMetadata
from relevo.kernels.triton import *  # noqa: F403 - all but attention

HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256))  # of keys and values


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
    alike = query.dtype == k_cache.dtype == v_cache.dtype and query.dtype in (torch.bfloat16, torch.float16)
    dims = (query.shape[2], v_cache.shape[3])
    if not alike or dims not in HEAD_DIMS or sinks is not None or not len(query) or not is_hopper(query.device):
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
    from flash_attn_interface import flash_attn_with_kvcache

    output: Tensor = flash_attn_with_kvcache(
        query if query.stride(2) == 1 else query.contiguous(),
        k_cache,
        v_cache,
        cache_seqlens=metadata.seq_lens,
        page_table=metadata.block_table,
        cu_seqlens_q=metadata.cu_seqlens_q,
        max_seqlen_q=metadata.max_query_len,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
    )
    return output


@cache
def is_hopper(device: torch.device) -> bool:
    """FlashAttention 3 has code for these GPUs only."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9

"""Attention and the cache write, compiled for a Hopper GPU in shapes that are served: nothing spills, all fits."""

from __future__ import annotations

from typing import Any

import torch

from relevo.kernels import AttentionMetadata
from tests.kernels.compiling import compile_launches

BFLOAT16, FP8, FLOAT32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32


def _metadata(query_lens: list[int], seq_len: int, block_size: int) -> AttentionMetadata:
    bounds = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    return AttentionMetadata(
        block_table=torch.zeros(len(query_lens), seq_len // block_size, dtype=torch.int32),
        slot_mapping=torch.zeros(int(bounds[-1]), dtype=torch.int64),
        seq_lens=torch.full((len(query_lens),), seq_len, dtype=torch.int32),
        cu_seqlens_q=bounds,
        max_query_len=max(query_lens),
        max_seq_len=seq_len,
    )


def _attend(
    query_lens: list[int],
    heads: int = 32,
    kv_heads: int = 8,
    k_dim: int = 128,
    v_dim: int = 128,
    *,
    seq_len: int = 4096,
    block_size: int = 16,
    dtype: torch.dtype = BFLOAT16,
    cache: torch.dtype | None = None,
    **options: Any,
) -> None:
    from relevo.kernels import triton

    metadata = _metadata(query_lens, seq_len, block_size)
    query = torch.empty(sum(query_lens), heads, k_dim, dtype=dtype)
    shape, cache = (1, block_size, kv_heads), cache or dtype
    k_cache, v_cache = torch.empty(*shape, k_dim, dtype=cache), torch.empty(*shape, v_dim, dtype=cache)
    scales: dict[str, Any] = {"k_scale": torch.ones(1), "v_scale": torch.ones(1)} if cache == FP8 else {}
    key, value = query[:, :kv_heads], torch.empty(sum(query_lens), kv_heads, v_dim, dtype=dtype)
    triton.store_kv(key, value, k_cache, v_cache, metadata.slot_mapping, **scales)
    triton.paged_attention(query, k_cache, v_cache, metadata, scale=1.0, **scales, **options)


def decode() -> None:
    _attend([1])
    _attend([1] * 64, cache=FP8)
    _attend([6] * 4, block_size=32)
    _attend([1], heads=16, kv_heads=8, k_dim=256, v_dim=256, sliding_window=1024, softcap=50.0)
    _attend([1], heads=64, kv_heads=8, k_dim=64, v_dim=64, sliding_window=128, sinks=torch.zeros(64))
    _attend([1], heads=32, kv_heads=32, k_dim=96, v_dim=96)
    _attend([1], dtype=FLOAT32)


def prompts() -> None:
    _attend([512, 100])
    _attend([1024], cache=FP8, block_size=64)
    _attend([2048], heads=16, kv_heads=8, k_dim=256, v_dim=256, sliding_window=1024, softcap=50.0)
    _attend([2048], heads=64, kv_heads=8, k_dim=64, v_dim=64, sliding_window=128, sinks=torch.zeros(64))
    _attend([2048], heads=16, kv_heads=16, k_dim=192, v_dim=128)
    _attend([2048], heads=32, kv_heads=32, k_dim=80, v_dim=80)
    _attend([1, 1], heads=128, kv_heads=1, k_dim=576, v_dim=512)
    _attend([512], dtype=FLOAT32)


def _check(function: str, at_least: int) -> None:
    kernels = compile_launches(f"{__name__}:{function}")
    assert len(kernels) >= at_least
    assert [kernel for kernel in kernels if not kernel.fits] == []


def test_decode() -> None:
    _check("decode", 10)


def test_prompts() -> None:
    _check("prompts", 8)

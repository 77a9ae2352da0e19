"""Writing a step's keys and values into the cache, rounded to its dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from relevo.kernels import reference
from relevo.kernels.triton.launch import FLOATS, FP8, num_warps

TILE = 2048  # elements of a program


@triton.jit(do_not_specialize=["slots"])
def store_kv_kernel(
    key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale,
    key_token, key_head, key_column, value_token, value_head, value_column,
    k_block, k_offset, k_head, v_block, v_offset, v_head, slots,
    kv_heads: tl.constexpr, k_dim: tl.constexpr, v_dim: tl.constexpr, block_size: tl.constexpr,
    HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """grid: (tokens, heads / HEADS)"""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if (slot >= 0) & (slot < slots):
        block, offset = slot // block_size, slot % block_size
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        _store(
            key + token * key_token, key_head, key_column, k_cache + block * k_block + offset * k_offset, k_head,
            k_scale, head, kv_heads, k_dim, K_DIM, SCALES,
        )  # fmt: skip
        _store(
            value + token * value_token, value_head, value_column, v_cache + block * v_block + offset * v_offset,
            v_head, v_scale, head, kv_heads, v_dim, V_DIM, SCALES,
        )  # fmt: skip


@triton.jit
def _store(
    source, source_head, source_column, target, target_head, scale, head,
    kv_heads: tl.constexpr, dim: tl.constexpr, DIM: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, DIM)[None, :]
    inside = (head < kv_heads) & (column < dim)
    x = tl.load(source + head * source_head + column * source_column, mask=inside)
    x = to_cache(x, scale, head, kv_heads, target.dtype.element_ty, SCALES)
    tl.store(target + head * target_head + column, x, mask=inside)


@triton.jit
def to_cache(x, scale, head, kv_heads, dtype: tl.constexpr, SCALES: tl.constexpr):
    """x, [HEADS, DIM] of heads `head`, [HEADS, 1], as the cache keeps it.

    SCALES: -1 a cache of 16 or 32 bits; of 8 bits 0 no scale, 1 one, 2 one a head
    """
    if SCALES >= 0:
        x = x.to(tl.float32)
        if SCALES == 1:
            x = x / tl.load(scale)
        if SCALES == 2:
            x = x / tl.load(scale + head, mask=head < kv_heads, other=1.0)
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)  # the largest float8_e4m3fn
    return x.to(dtype)


def scale_kind(cache: Tensor, scale: Tensor | None) -> int:
    """SCALES of `to_cache`."""
    if cache.dtype != FP8:
        return -1
    return 0 if scale is None else 2 if scale.numel() > 1 else 1


def store_kv(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """See `Kernels.store_kv`. A token whose slot is outside the cache is not written."""
    num_blocks, block_size, kv_heads, k_dim = k_cache.shape
    num_tokens, v_dim = len(slot_mapping), v_cache.shape[3]
    if key.dtype not in FLOATS or k_cache.dtype not in (*FLOATS, FP8):
        reference.store_kv(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale)
        return
    assert key.shape == (num_tokens, kv_heads, k_dim), (key.shape, k_cache.shape)
    assert value.shape == (num_tokens, kv_heads, v_dim), (value.shape, v_cache.shape)
    assert k_cache.stride(3) == v_cache.stride(3) == 1, (k_cache.stride(), v_cache.stride())
    assert slot_mapping.dtype == torch.int64 and slot_mapping.stride(0) == 1, slot_mapping.dtype
    if num_tokens == 0:
        return
    k_padded, v_padded = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim)
    heads_at_once = min(triton.next_power_of_2(kv_heads), max(1, TILE // max(k_padded, v_padded)))
    store_kv_kernel[(num_tokens, triton.cdiv(kv_heads, heads_at_once))](
        key, value, k_cache, v_cache, slot_mapping, key if k_scale is None else k_scale,
        value if v_scale is None else v_scale, *key.stride(), *value.stride(),
        *k_cache.stride()[:3], *v_cache.stride()[:3], num_blocks * block_size,
        kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim, block_size=block_size, HEADS=heads_at_once,
        K_DIM=k_padded, V_DIM=v_padded, SCALES=scale_kind(k_cache, k_scale),
        num_warps=num_warps(heads_at_once * max(k_padded, v_padded)),
    )  # fmt: skip

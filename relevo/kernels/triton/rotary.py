"""Rotary embedding and the write into the cache, in one launch.

dtypes: float32, bfloat16 and float16, for activations, angles and cache independently; others go to `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from relevo.kernels import reference
from relevo.kernels.triton.launch import FLOATS, num_warps
from relevo.kernels.triton.store import scale_kind, to_cache

TILE = 1024  # elements of a program


@triton.jit(do_not_specialize=["slots"])
def rotary_store_kv_kernel(
    query, key, value, cos, sin, k_cache, v_cache, slot_mapping, out, k_scale, v_scale,
    query_token, query_head, query_dim, key_token, key_head, key_dim, value_token, value_head, value_dim,
    cos_token, cos_dim, sin_token, sin_dim,
    k_block, k_offset, k_head, k_cache_dim, v_block, v_offset, v_head, v_cache_dim,
    slots,
    heads: tl.constexpr, kv_heads: tl.constexpr, k_dim: tl.constexpr, v_dim: tl.constexpr,
    block_size: tl.constexpr, half: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, V_DIM: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """One token's heads: first those of the query, HEADS a program, then those of the key, then the value's."""
    token = tl.program_id(0).to(tl.int64)
    query_tiles = (heads + HEADS - 1) // HEADS
    kv_tiles = (kv_heads + HEADS - 1) // HEADS
    tile = tl.program_id(1)
    cos += token * cos_token
    sin += token * sin_token
    if tile < query_tiles:
        _rotate(
            query + token * query_token, query_head, query_dim, out + token * heads * k_dim, k_dim, 1, cos, cos_dim,
            sin, sin_dim, k_scale, tile * HEADS, heads, k_dim, half, HEADS, HALF, REST, -1,
        )  # fmt: skip
    else:
        slot = tl.load(slot_mapping + token)
        if (slot >= 0) & (slot < slots):
            block, offset = slot // block_size, slot % block_size
            if tile < query_tiles + kv_tiles:
                _rotate(
                    key + token * key_token, key_head, key_dim, k_cache + block * k_block + offset * k_offset, k_head,
                    k_cache_dim, cos, cos_dim, sin, sin_dim, k_scale, (tile - query_tiles) * HEADS, kv_heads, k_dim,
                    half, HEADS, HALF, REST, SCALES,
                )  # fmt: skip
            else:
                head = (tile - query_tiles - kv_tiles) * HEADS + tl.arange(0, HEADS)[:, None]
                column = tl.arange(0, V_DIM)[None, :]
                inside = (head < kv_heads) & (column < v_dim)
                source = value + token * value_token + head * value_head + column * value_dim
                target = v_cache + block * v_block + offset * v_offset + head * v_head + column * v_cache_dim
                loaded = tl.load(source, mask=inside)
                loaded = to_cache(loaded, v_scale, head, kv_heads, v_cache.dtype.element_ty, SCALES)
                tl.store(target, loaded, mask=inside)


@triton.jit
def _rotate(
    source, source_head, source_dim, target, target_head, target_dim, cos, cos_dim, sin, sin_dim, scale, first_head,
    heads, dim: tl.constexpr, half: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """Of HEADS heads of one token, pairs (j, j + half); what lies beyond 2 * half is copied."""
    head = first_head + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)
    within = pair < half
    cos_left = tl.load(cos + pair * cos_dim, mask=within, other=0.0).to(tl.float32)[None, :]
    cos_right = tl.load(cos + (pair + half) * cos_dim, mask=within, other=0.0).to(tl.float32)[None, :]
    sin_left = tl.load(sin + pair * sin_dim, mask=within, other=0.0).to(tl.float32)[None, :]
    sin_right = tl.load(sin + (pair + half) * sin_dim, mask=within, other=0.0).to(tl.float32)[None, :]
    pair = pair[None, :]
    inside = (head < heads) & (pair < half)
    source += head * source_head
    target += head * target_head
    left = tl.load(source + pair * source_dim, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + (pair + half) * source_dim, mask=inside, other=0.0).to(tl.float32)
    # rounded to the activations' dtype before the cache's, as where rotation and cache write are two steps
    turned_left = (left * cos_left - right * sin_left).to(source.dtype.element_ty)
    turned_right = (right * cos_right + left * sin_right).to(source.dtype.element_ty)
    turned_left = to_cache(turned_left, scale, head, heads, target.dtype.element_ty, SCALES)
    turned_right = to_cache(turned_right, scale, head, heads, target.dtype.element_ty, SCALES)
    tl.store(target + pair * target_dim, turned_left, mask=inside)
    tl.store(target + (pair + half) * target_dim, turned_right, mask=inside)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)[None, :]
        beyond = (head < heads) & (column < dim)
        rest = tl.load(source + column * source_dim, mask=beyond)
        rest = to_cache(rest, scale, head, heads, target.dtype.element_ty, SCALES)
        tl.store(target + column * target_dim, rest, mask=beyond)


def rotary_store_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """See `Kernels.rotary_store_kv`. A token whose slot is outside the cache is rotated and not written."""
    if query.dtype not in FLOATS:
        return reference.rotary_store_kv(query, key, value, cos, sin, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    num_tokens, heads, k_dim = query.shape
    num_blocks, block_size, kv_heads, v_dim = v_cache.shape
    assert key.shape == (num_tokens, *k_cache.shape[2:]), (key.shape, k_cache.shape)
    assert value.shape == (num_tokens, kv_heads, v_dim), (value.shape, v_cache.shape)
    assert slot_mapping.dtype == torch.int64 and slot_mapping.stride(0) == 1, slot_mapping.dtype
    out = torch.empty(num_tokens, heads, k_dim, dtype=query.dtype, device=query.device)
    if num_tokens == 0:
        return out
    half = cos.shape[1] // 2
    block_dim = triton.next_power_of_2(max(k_dim, v_dim))
    heads_at_once = min(triton.next_power_of_2(heads), max(1, TILE // block_dim))
    grid = (num_tokens, triton.cdiv(heads, heads_at_once) + 2 * triton.cdiv(kv_heads, heads_at_once))
    rest = k_dim - 2 * half
    rotary_store_kv_kernel[grid](
        query, key, value, cos, sin, k_cache, v_cache, slot_mapping, out,
        query if k_scale is None else k_scale, query if v_scale is None else v_scale,
        *query.stride(), *key.stride(), *value.stride(), *cos.stride(), *sin.stride(),
        *k_cache.stride(), *v_cache.stride(), num_blocks * block_size,
        heads=heads, kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim, block_size=block_size, half=half,
        HEADS=heads_at_once, HALF=triton.next_power_of_2(half), REST=triton.next_power_of_2(rest) if rest else 0,
        V_DIM=triton.next_power_of_2(v_dim), SCALES=scale_kind(k_cache, k_scale),
        num_warps=num_warps(heads_at_once * block_dim),
    )  # fmt: skip
    return out

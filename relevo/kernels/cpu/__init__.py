"""Kernels for the CPU, compiled by numba.

Paged attention: a batch is cut into items of work (`plan`), threads take them one after another (`attention`), and each
streams over tiles of keys in float32 vectors (`tile`, `simd`). Everything small goes through `calls`. Threads are
torch's own, and as many as torch.get_num_threads(): see `openmp` for why not numba's.

dtypes: float32, bfloat16 and float16, for queries and cache independently; others go to `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relevo.kernels import reference
from relevo.kernels.cpu import activation, draw, logprobs, masks, norm, rotary, topk
from relevo.kernels.cpu.activation import gated_activation
from relevo.kernels.cpu.draw import sample
from relevo.kernels.cpu.jit import announced
from relevo.kernels.cpu.linear import prepare_linear
from relevo.kernels.cpu.logprobs import score
from relevo.kernels.cpu.masks import mask_logits
from relevo.kernels.cpu.norm import add_rms_norm, rms_norm
from relevo.kernels.cpu.paged import paged_attention
from relevo.kernels.cpu.rotary import rotary_store_kv
from relevo.kernels.cpu.simd import ELEMENTS
from relevo.kernels.cpu.store import Lines, scatter
from relevo.kernels.cpu.topk import argmax, top_k
from relevo.kernels.metadata import AttentionMetadata
from relevo.kernels.reference import apply_penalties, gather_blocks, scatter_blocks, sgmv

__all__ = [
    "WIDENS_16_BITS",
    "add_rms_norm",
    "apply_penalties",
    "argmax",
    "gated_activation",
    "gather_blocks",
    "mask_logits",
    "paged_attention",
    "prepare_linear",
    "rms_norm",
    "rotary_store_kv",
    "sample",
    "scatter_blocks",
    "score",
    "sgmv",
    "store_kv",
    "top_k",
    "warm_up",
]

WIDENS_16_BITS = True


def store_kv(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write a step's keys and values into the cache; see `Kernels.store_kv`."""
    if k_cache.dtype == torch.float8_e4m3fn:
        reference.store_kv(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale)
        return
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


def warm_up(dtype: torch.dtype) -> None:
    """Compile everything, or load it from disk, and start the threads; one compilation serves every dtype."""
    with announced():
        _compile_all(dtype)


def _compile_all(dtype: torch.dtype) -> None:
    dtype = dtype if dtype in ELEMENTS else torch.float32
    cache = torch.zeros(1, 1, 1, 16, dtype=dtype)
    token = torch.zeros(1, 1, 16, dtype=dtype)
    slot, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    bounds, table = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    store_kv(token, token, cache, cache, slot)
    paged_attention(token, cache, cache, AttentionMetadata(table, slot, one, bounds, 1, 1), scale=1.0)
    for kernel in (norm, rotary, activation, topk, draw, logprobs, masks):
        kernel.compile()
    prepare_linear([cache.view(1, 16)], [None])(cache.view(1, 16))


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

"""Rotary embedding of a step's queries and keys; keys and values go straight into the cache."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from relevo.kernels import reference
from relevo.kernels.cpu.calls import Call
from relevo.kernels.cpu.elements import element_size, load_elements, load_part, store_elements, store_part
from relevo.kernels.cpu.jit import CFunction, callback, jit, sources_digest
from relevo.kernels.cpu.simd import (
    ELEMENTS,
    LANES,
    copy_bytes,
    fetch_add,
    fma,
    load_int64,
    multiply,
    record,
    subtract,
)
from relevo.kernels.cpu.store import check_slots


class Arguments(NamedTuple):
    """Addresses, strides in bytes, counts. A row of work is a token; the rotated query is contiguous."""

    counter: int
    workers: int
    chunk: int
    tokens: int
    query: int
    query_token_stride: int
    query_head_stride: int
    key: int
    key_token_stride: int
    key_head_stride: int
    value: int
    value_token_stride: int
    value_head_stride: int
    cos: int
    sin: int
    angle_stride: int
    angle_element: int
    k_cache: int
    k_block_stride: int
    k_token_stride: int
    k_head_stride: int
    v_cache: int
    v_block_stride: int
    v_token_stride: int
    v_head_stride: int
    slots: int
    block_size: int
    output: int
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    rot_dim: int
    element: int


_load, _ = record(Arguments)


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
    """See `Kernels.rotary_store_kv`."""
    dtype = query.dtype
    element, angle_element = ELEMENTS.get(dtype), ELEMENTS.get(cos.dtype)
    alike = key.dtype == value.dtype == k_cache.dtype == v_cache.dtype == dtype and sin.dtype == cos.dtype
    q_strides, k_strides, v_strides = query.stride(), key.stride(), value.stride()
    dense = q_strides[2] == k_strides[2] == v_strides[2] == 1 and cos.stride(1) == sin.stride(1) == 1
    if element is None or angle_element is None or not alike or not dense or cos.stride(0) != sin.stride(0):
        return reference.rotary_store_kv(query, key, value, cos, sin, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    tokens, heads, k_dim = query.shape
    num_blocks, block_size, kv_heads, v_dim = v_cache.shape
    rot_dim = cos.shape[1]
    assert key.shape == (tokens, kv_heads, k_dim), (key.shape, query.shape, v_cache.shape)
    assert value.shape == (tokens, kv_heads, v_dim), (value.shape, query.shape, v_cache.shape)
    assert k_cache.shape == (num_blocks, block_size, kv_heads, k_dim), (k_cache.shape, query.shape, v_cache.shape)
    assert cos.shape == sin.shape == (tokens, rot_dim) and rot_dim <= k_dim and rot_dim % 2 == 0, (cos.shape, sin.shape)
    assert slot_mapping.shape == (tokens,) and slot_mapping.is_contiguous(), (slot_mapping.shape, tokens)
    k_cache_strides, v_cache_strides = k_cache.stride(), v_cache.stride()
    assert k_cache_strides[3] == v_cache_strides[3] == 1, (k_cache_strides, v_cache_strides)
    size, slots = query.element_size(), slot_mapping.data_ptr()
    check_slots(slots, tokens, num_blocks * block_size)
    output = query.new_empty(tokens, heads, k_dim)
    _rotate.run(
        tokens,
        heads * k_dim + kv_heads * (k_dim + v_dim),
        query.data_ptr(),
        q_strides[0] * size,
        q_strides[1] * size,
        key.data_ptr(),
        k_strides[0] * size,
        k_strides[1] * size,
        value.data_ptr(),
        v_strides[0] * size,
        v_strides[1] * size,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.stride(0) * cos.element_size(),
        angle_element,
        k_cache.data_ptr(),
        k_cache_strides[0] * size,
        k_cache_strides[1] * size,
        k_cache_strides[2] * size,
        v_cache.data_ptr(),
        v_cache_strides[0] * size,
        v_cache_strides[1] * size,
        v_cache_strides[2] * size,
        slots,
        block_size,
        output.data_ptr(),
        heads,
        kv_heads,
        k_dim,
        v_dim,
        rot_dim,
        element,
    )
    return output


def _build() -> CFunction:
    digest = sources_digest()

    def work(address: int) -> None:
        assert digest >= 0  # closed over, so that machine code on disk is only used with the source it came from
        arguments = _load(address)
        while True:
            first = fetch_add(address, 1) * arguments.chunk
            if first >= arguments.tokens:
                break
            for token in range(first, min(first + arguments.chunk, arguments.tokens)):
                _rotate_token(arguments, token)

    return callback(work)


_rotate = Call(_build, Arguments, floats=0)
compile = _rotate.compile


@jit
def _rotate_token(a: Arguments, token: int) -> None:
    size = element_size(a.element)
    cos, sin = a.cos + token * a.angle_stride, a.sin + token * a.angle_stride
    for head in range(a.heads):
        source = a.query + token * a.query_token_stride + head * a.query_head_stride
        _rotate_head(a, a.output + (token * a.heads + head) * a.k_dim * size, source, cos, sin)
    slot = load_int64(a.slots + 8 * token)
    block_id, offset = slot // a.block_size, slot % a.block_size
    key, value = a.key + token * a.key_token_stride, a.value + token * a.value_token_stride
    k_slot = a.k_cache + block_id * a.k_block_stride + offset * a.k_token_stride
    v_slot = a.v_cache + block_id * a.v_block_stride + offset * a.v_token_stride
    for head in range(a.kv_heads):
        _rotate_head(a, k_slot + head * a.k_head_stride, key + head * a.key_head_stride, cos, sin)
        copy_bytes(v_slot + head * a.v_head_stride, value + head * a.value_head_stride, a.v_dim * size)


@jit
def _rotate_head(a: Arguments, target: int, source: int, cos: int, sin: int) -> None:
    """(left, right) becomes (left cos - right sin, right cos + left sin), where cos and sin have both halves, too."""
    element, angles, half = a.element, a.angle_element, a.rot_dim // 2
    whole = half - half % LANES
    for i in range(0, whole, LANES):
        left, right = load_elements(source, i, element), load_elements(source, half + i, element)
        turned = multiply(right, load_elements(sin, i, angles))
        store_elements(target, i, subtract(multiply(left, load_elements(cos, i, angles)), turned), element)
        turned = multiply(left, load_elements(sin, half + i, angles))
        store_elements(target, half + i, fma(right, load_elements(cos, half + i, angles), turned), element)
    if whole < half:
        rest = half - whole
        left, right = load_part(source, whole, rest, element), load_part(source, half + whole, rest, element)
        turned = multiply(right, load_part(sin, whole, rest, angles))
        lower = subtract(multiply(left, load_part(cos, whole, rest, angles)), turned)
        turned = multiply(left, load_part(sin, half + whole, rest, angles))
        upper = fma(right, load_part(cos, half + whole, rest, angles), turned)
        store_part(target, whole, lower, rest, element)
        store_part(target, half + whole, upper, rest, element)
    if a.rot_dim < a.k_dim:
        begin = a.rot_dim * element_size(element)
        copy_bytes(target + begin, source + begin, (a.k_dim - a.rot_dim) * element_size(element))

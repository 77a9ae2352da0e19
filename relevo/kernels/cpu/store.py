"""Writing a step's keys and values into the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from relevo.kernels.cpu.jit import entry_point, jit, sources_digest
from relevo.kernels.cpu.simd import copy_bytes, load_int64


class Lines(NamedTuple):
    """Keys or values on their way from [num_tokens, kv_heads, dim] to the cache; strides in bytes."""

    source: int
    token_stride: int
    head_stride: int
    cache: int
    cache_block_stride: int
    cache_token_stride: int
    cache_head_stride: int
    head_bytes: int


@jit
def _copy_token(lines: Lines, token: int, block_id: int, offset: int, kv_heads: int) -> None:
    source = lines.source + token * lines.token_stride
    target = lines.cache + block_id * lines.cache_block_stride + offset * lines.cache_token_stride
    for head in range(kv_heads):
        copy_bytes(target + head * lines.cache_head_stride, source + head * lines.head_stride, lines.head_bytes)


@jit
def _check_slots(slots: int, num_tokens: int, num_slots: int) -> None:
    for token in range(num_tokens):
        slot = load_int64(slots + 8 * token)
        if slot < 0 or slot >= num_slots:
            raise IndexError("slot_mapping names a slot that is not in the cache")


def _build_check(digest: int) -> Callable[[int, int, int], None]:
    @entry_point
    def check_slots(slots: int, num_tokens: int, num_slots: int) -> None:
        """Raise IndexError if one of the int64 at an address is not a slot of a cache of so many."""
        assert digest >= 0  # as below
        _check_slots(slots, num_tokens, num_slots)

    return check_slots


def _build(digest: int) -> Callable[[Lines, Lines, int, int, int, int, int], None]:
    @entry_point
    def scatter(
        key: Lines, value: Lines, slots: int, num_tokens: int, num_blocks: int, block_size: int, kv_heads: int
    ) -> None:
        assert digest >= 0  # closed over, so that machine code on disk is only used with the source it came from
        _check_slots(slots, num_tokens, num_blocks * block_size)
        for token in range(num_tokens):
            slot = load_int64(slots + 8 * token)
            block_id, offset = slot // block_size, slot % block_size
            _copy_token(key, token, block_id, offset, kv_heads)
            _copy_token(value, token, block_id, offset, kv_heads)

    return scatter


check_slots = _build_check(sources_digest())
scatter = _build(sources_digest())

"""Names of KV blocks: a sha256 chain over everything that determines a block's bytes.

    block_hash[i]  = sha256(block_hash[i-1] ‖ token ids of block i, little-endian u32)
    block_hash[-1] = sha256(layout fingerprint ‖ adapter id ‖ cache_salt)

Only full blocks have names. Never depends on the process: the same everywhere, today and next year.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

BlockHash = bytes
HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's KV of one token: kv_heads × k_dim keys, kv_heads × v_dim values."""

    kv_heads: int
    k_dim: int
    v_dim: int


def layout_fingerprint(
    model: str, revision: str, quantization: str, kv_dtype: str, block_size: int, layers: Sequence[LayerShape]
) -> bytes:
    """32 bytes that two workers share exactly when their blocks are interchangeable.

    model: id or, for a local folder, a digest of what defines the weights; revision: commit or "";
    quantization: "" for none; kv_dtype: e.g. "bfloat16".
    """
    shapes = ";".join(f"{layer.kv_heads},{layer.k_dim},{layer.v_dim}" for layer in layers)
    parts = (model, revision, quantization, kv_dtype, str(block_size), shapes)
    return sha256(b"".join(_sized(part.encode()) for part in parts)).digest()


def root_hash(fingerprint: bytes, adapter_id: str = "", cache_salt: str = "") -> BlockHash:
    """The hash before a sequence's first block."""
    return sha256(fingerprint + _sized(adapter_id.encode()) + _sized(cache_salt.encode())).digest()


def hash_blocks(
    parent: BlockHash, token_ids: Sequence[int], block_size: int, start: int = 0, stop: int | None = None
) -> list[BlockHash]:
    """Names of the full blocks in token_ids[start:stop], chained on from `parent`; a rest has none.

    Raises OverflowError for a token id that is not a u32.
    """
    stop = len(token_ids) if stop is None else stop
    num_blocks = (stop - start) // block_size
    if num_blocks <= 0:
        return []
    raw = _little_endian_u32(token_ids[start : start + num_blocks * block_size])
    chunk_bytes = block_size * 4
    hashes = []
    for offset in range(0, len(raw), chunk_bytes):
        parent = sha256(parent + raw[offset : offset + chunk_bytes]).digest()
        hashes.append(parent)
    return hashes


def _little_endian_u32(token_ids: Sequence[int]) -> bytes:
    values = array("I", token_ids)
    assert values.itemsize == 4
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _sized(part: bytes) -> bytes:
    """Length first, so that no two lists of parts have the same bytes."""
    return len(part).to_bytes(4, "little") + part

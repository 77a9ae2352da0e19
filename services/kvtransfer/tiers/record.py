"""A block outside the arena: a header that says what it is, then its bytes. The same in every tier.

    magic and version (8) ‖ name (32) ‖ block_bytes (u64) ‖ xxh3-64 of the block (u64), little-endian; then the block

The name covers the layout, so a block of another model or version of the code is another name. The checksum is the one
that the block was sealed with: what comes back is verified against what its first writer computed.
"""

from __future__ import annotations

import struct

import xxhash

from relevo.core.block_hash import BlockHash

_MAGIC = b"RELEVOK1"
_HEADER = struct.Struct("<8s32sQQ")
HEADER_BYTES = _HEADER.size


def pack_header(name: BlockHash, block_bytes: int, checksum: int) -> bytes:
    return _HEADER.pack(_MAGIC, name, block_bytes, checksum)


def verified_checksum(header: bytes | memoryview, name: BlockHash, block: memoryview) -> int | None:
    """The block's checksum; None unless header and block are whole, and those of this name."""
    if len(header) != HEADER_BYTES:
        return None
    magic, found_name, block_bytes, checksum = _HEADER.unpack(header)
    if magic != _MAGIC or found_name != name or block_bytes != len(block):
        return None
    return checksum if is_intact(block, checksum) else None


def is_intact(block: memoryview, checksum: int) -> bool:
    """Releases the GIL."""
    return xxhash.xxh3_64_intdigest(block) == checksum

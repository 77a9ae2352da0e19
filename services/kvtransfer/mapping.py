"""A worker's view of its agent's arena, and the copies in and out of it."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from relevo.core.errors import Mismatch, Unavailable

BlockBytes = bytes | bytearray | memoryview | npt.NDArray[np.uint8]
"""block_bytes, contiguous."""


@dataclass(frozen=True)
class ArenaMapping:
    """The arena of one incarnation of an agent. Slots of another incarnation mean nothing here.

    Memory of an agent that is gone stays mapped, and readable, until the last view of it is.
    """

    incarnation: str
    block_bytes: int
    slot_bytes: int
    num_slots: int
    agent_address: str  # under which other agents reach the agent
    view: memoryview

    def slot(self, slot: int) -> memoryview:
        """The first block_bytes of a slot, writable."""
        if not 0 <= slot < self.num_slots:
            raise Mismatch(f"slot {slot} is not in the arena, which has {self.num_slots}")
        start = slot * self.slot_bytes
        return self.view[start : start + self.block_bytes]


def map_arena(path: str, num_bytes: int) -> memoryview:
    """Map the agent's file, shared and writable. Unavailable if it is not there, Mismatch if it is not allowed."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Unavailable(
            f"the agent's arena {path} is not there: the agent has just ended, or this worker does not share its tmpfs"
        ) from error
    except OSError as error:
        raise Mismatch(f"the agent's arena {path} cannot be opened: {error.strerror}") from error
    try:
        if os.fstat(fd).st_size < num_bytes:
            raise Mismatch(f"the agent's arena {path} is smaller than {num_bytes} bytes")
        return memoryview(mmap.mmap(fd, num_bytes, mmap.MAP_SHARED))
    finally:
        os.close(fd)


def write_block(slot: memoryview, source: BlockBytes) -> int:
    """Copy a block into its slot; returns the checksum to seal it with, computed from the source.

    slot, source: block_bytes each. Blocking, for a thread: releases the GIL. Nobody may change the source meanwhile.
    """
    block = _bytes_of(source)
    np.copyto(_bytes_of(slot), block)
    return xxhash.xxh3_64_intdigest(block.data)


def read_block(slot: memoryview, into: BlockBytes, checksum: int) -> bool:
    """Copy a block out of a slot; False if the copy is not what its writer sealed (it must not be used then).

    slot, into: block_bytes each. Blocking, for a thread: releases the GIL. The copy is checked, not the slot, so that
    nobody can change what was checked.
    """
    block = _bytes_of(into)
    np.copyto(block, _bytes_of(slot))
    return xxhash.xxh3_64_intdigest(block.data) == checksum


def _bytes_of(buffer: BlockBytes) -> npt.NDArray[np.uint8]:
    array: npt.NDArray[np.uint8] = np.frombuffer(buffer, dtype=np.uint8)
    return array

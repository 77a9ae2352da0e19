"""A worker's view of its agent's arena, and the copies in and out of it."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from relevo.core.errors import Mismatch, Unavailable

logger = logging.getLogger(__name__)

_LIBC = ctypes.CDLL(None)
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_PREPARE_BYTES = 64 << 20
_MIN_CHECKED_BYTES = 1024

_checked_copy: Callable[[Sequence[int], Sequence[int], int], list[int]] | None = None  # of this process

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


def write_blocks(slots: Sequence[memoryview], sources: Sequence[BlockBytes]) -> list[int]:
    """Copy blocks into their slots; returns the checksums to seal them with: the sources', whatever is in the slots.

    A slot may have had another writer, whose lease has ended and who has not noticed (a process that was stopped): what
    he still writes there must not get into our checksum, or readers would take it for our block.

    slots, sources: block_bytes each. Blocking, for a thread: releases the GIL. Nobody may change the sources meanwhile.
    """
    private = [_bytes_of(source) for source in sources]
    return _copy([_bytes_of(slot) for slot in slots], private, private)


def read_blocks(slots: Sequence[memoryview], into: Sequence[BlockBytes], checksums: Sequence[int]) -> list[bool]:
    """Copy blocks out of their slots; False for each that is not what its writer sealed (it must not be used then).

    slots, into: block_bytes each. Blocking, for a thread: releases the GIL. The copy is checked, not the slot, so that
    nobody can change what was checked.
    """
    private = [_bytes_of(block) for block in into]
    found = _copy(private, [_bytes_of(slot) for slot in slots], private)
    return [checksum == right for checksum, right in zip(found, checksums, strict=True)]


def write_block(slot: memoryview, source: BlockBytes) -> int:
    """write_blocks for one."""
    return write_blocks([slot], [source])[0]


def read_block(slot: memoryview, into: BlockBytes, checksum: int) -> bool:
    """read_blocks for one."""
    return read_blocks([slot], [into], [checksum])[0]


def load_checked_copy() -> None:
    """Copy and checksum in one pass from now on, where numba is loaded already: in workers. Takes seconds the first
    time on a machine; harmless when called again, and in any thread.
    """
    global _checked_copy
    if _checked_copy is not None or "numba" not in sys.modules:
        return
    from relevo.kernels import checked_copy

    if checked_copy.check():
        _checked_copy = checked_copy.copy_checked
    else:
        logger.warning("the compiled copy of blocks is wrong on this machine: they are copied and checked separately")


def prepare(view: memoryview) -> None:
    """Touch all of a shared mapping, which must have its memory: a page's first touch costs more than copying it.

    Blocking: a second or so a GiB, and more where a hypervisor gives the memory only now. Releases the GIL.
    """
    address = np.frombuffer(view, np.uint8).ctypes.data
    for start in range(0, len(view), _PREPARE_BYTES):
        num_bytes = min(_PREPARE_BYTES, len(view) - start)
        # By ctypes, as mmap.madvise keeps the GIL. An old kernel knows no such advice: then it is slower, and works.
        if _LIBC.madvise(ctypes.c_void_p(address + start), ctypes.c_size_t(num_bytes), _MADV_POPULATE_WRITE) != 0:
            return


def _copy(
    targets: list[npt.NDArray[np.uint8]], sources: list[npt.NDArray[np.uint8]], private: list[npt.NDArray[np.uint8]]
) -> list[int]:
    """The checksums. private: those of the two which nobody else can write to, and which are hashed for that."""
    sizes = {array.nbytes for array in (*targets, *sources)}
    if len(sizes) > 1:
        raise ValueError(f"blocks of one size are needed, not of {sorted(sizes)} bytes")
    if _checked_copy is not None and min(sizes, default=0) >= _MIN_CHECKED_BYTES:
        return _checked_copy([_address(each) for each in targets], [_address(each) for each in sources], sizes.pop())
    checksums = []
    for target, source, hashed in zip(targets, sources, private, strict=True):
        np.copyto(target, source)
        checksums.append(xxhash.xxh3_64_intdigest(hashed.data))
    return checksums


def _address(array: npt.NDArray[np.uint8]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _bytes_of(buffer: BlockBytes) -> npt.NDArray[np.uint8]:
    array: npt.NDArray[np.uint8] = np.frombuffer(buffer, dtype=np.uint8)
    return array

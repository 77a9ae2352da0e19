"""Where a block is beside its slot: in the memory of the worker that has sealed it a moment ago."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relevo.core.block_hash import BlockHash
from services.pb import kvtransfer_pb2

PLACE_SECONDS = 10.0  # a writer that is done lets go of its blocks, and needs their room at some time
_MAX_MEMORIES = 16  # told in one message


@dataclass(frozen=True, slots=True)
class DirectPlace:
    """A block of a worker's cache. Its bytes may be others by now: only a checksum tells."""

    memory: kvtransfer_pb2.DirectMemory
    block_id: int


class DirectPlaces:
    """By name, for PLACE_SECONDS. clock: in seconds"""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._places: OrderedDict[BlockHash, tuple[float, DirectPlace]] = OrderedDict()  # with when it ends, in order

    def put(self, name: BlockHash, place: DirectPlace | None) -> None:
        """The block was sealed; None: by somebody who shows it nowhere else."""
        self._places.pop(name, None)
        self._forget_old()
        if place is not None:
            self._places[name] = self._clock() + PLACE_SECONDS, place

    def find(self, name: BlockHash) -> DirectPlace | None:
        self._forget_old()
        _, place = self._places.get(name, (0.0, None))
        return place

    def _forget_old(self) -> None:
        now = self._clock()
        while self._places and next(iter(self._places.values()))[0] <= now:
            self._places.popitem(last=False)


def tell_places(reply: kvtransfer_pb2.FetchReply, places: Sequence[DirectPlace | None]) -> None:
    """places: of reply.blocks, each."""
    numbers: dict[bytes, int] = {}
    for block, place in zip(reply.blocks, places, strict=True):
        if place is None:
            continue
        key = place.memory.metadata
        if key not in numbers and len(numbers) < _MAX_MEMORIES:
            reply.direct_memories.append(place.memory)
            numbers[key] = len(numbers) + 1
        block.direct_memory, block.block_id = numbers.get(key, 0), place.block_id


def read_place(reply: kvtransfer_pb2.FetchReply, block: kvtransfer_pb2.BlockRef) -> DirectPlace | None:
    """Of a block of this reply."""
    if not 0 < block.direct_memory <= len(reply.direct_memories):
        return None
    return DirectPlace(reply.direct_memories[block.direct_memory - 1], block.block_id)

"""What lies below the arena: slower places that hold the same names. `Tiers` (cascade.py) moves blocks between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from relevo.core.block_hash import BlockHash
from services.kvtransfer.tiers.breaker import Breaker


@dataclass(frozen=True, slots=True)
class SealedBlock:
    """A block to be written. block: block_bytes, pinned in the arena."""

    name: BlockHash
    checksum: int
    block: memoryview


@dataclass(slots=True)
class TierCounters:
    """Since the start, in blocks."""

    hits: int = 0  # read, good
    stored: int = 0
    evicted: int = 0  # for room
    damaged: int = 0  # truncated, changed or foreign: dropped
    dropped: Counter[str] = field(default_factory=Counter)  # not written, by reason


class Tier(Protocol):
    """One tier. Used from the event loop, which it never blocks. A failure of its device or server trips a breaker,
    and nothing else: what is asked for is not there then, what is to be written is dropped.
    """

    name: str
    place: str  # where, for people; without secrets
    max_bytes: int
    counters: TierCounters
    reading: Breaker
    writing: Breaker

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    async def holds(self, names: Sequence[BlockHash], block_bytes: int) -> set[BlockHash]:
        """Those that a read would probably find. Bounded in time."""
        ...

    async def read(self, blocks: Sequence[tuple[BlockHash, memoryview]]) -> list[int | None]:
        """Read each block into its block_bytes; its checksum, verified, or None if it can't be had.

        When this returns, or raises (CancelledError alone), nobody writes into the memory any more. So it may take long
        where a device hangs; whoever waits must be told meanwhile.
        """
        ...

    async def write(self, blocks: Sequence[SealedBlock]) -> list[BlockHash]:
        """Store them; returns those whose bytes were not what their checksums say. When this returns or raises
        (CancelledError alone), nobody reads the memory any more.
        """
        ...

    async def list_blocks(self, limit: int) -> list[tuple[BlockHash, int]]:
        """(name, bytes), at most limit, most recently used first where that is known."""
        ...

    async def clear(self) -> int:
        """Forget all; how many blocks that were."""
        ...

    async def run(self) -> None:
        """What it does in the background; cancelled at shutdown."""
        ...

    async def close(self) -> None: ...


def total_bytes(views: Iterable[memoryview]) -> int:
    return sum(len(view) for view in views)

"""The agent's store: the slot table over the arena, and the readers who wait for blocks. Lives in the event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from relevo.core.block_hash import BlockHash
from relevo.core.errors import Mismatch
from relevo.core.sizes import format_size
from services.kvtransfer.arena import Arena
from services.kvtransfer.direct_places import DirectPlace, DirectPlaces
from services.kvtransfer.held import HeldNames
from services.kvtransfer.slots import Announcement, SlotTable

logger = logging.getLogger(__name__)


class Waiter(Protocol):
    """Somebody who waits for granted blocks. Called in the event loop; must not block."""

    def block_sealed(self, name: BlockHash) -> None: ...

    def block_missing(self, name: BlockHash, code: int) -> None: ...


@dataclass
class Counters:
    """Since the start."""

    sealed_blocks: int = 0
    fetched_blocks: int = 0
    arena_hits: int = 0  # blocks that were in the arena when a writer announced or a reader asked for them
    leases_expired: int = 0  # writers that were silent for too long
    pins_expired: int = 0  # readers that kept their pins for too long
    missing_blocks: dict[str, int] = field(default_factory=dict)  # by code
    corrupt_blocks: int = 0


class Store:
    """All changes of the table go through here, so that nobody who waits is forgotten.

    held: the names that are found here, and in what lies below
    direct_places: where writers have blocks that they have sealed a moment ago
    on_sealed: called with each name that was sealed, when those who wait for it have been told
    """

    def __init__(self, arena: Arena, incarnation: str) -> None:
        self.arena = arena
        self.table = SlotTable(0)
        self.counters = Counters()
        self.held = HeldNames()
        self.direct_places = DirectPlaces()
        self.on_sealed: Callable[[BlockHash], None] | None = None
        self._incarnation = incarnation
        self._num_cuts = 0
        self._evictions_before = 0  # of the tables before this one
        self._waiters: dict[BlockHash, set[Waiter]] = {}

    @property
    def incarnation(self) -> str:
        """Of the arena as it is cut now: what is known of another one's slots means nothing here."""
        return f"{self._incarnation}.{self._num_cuts}"

    @property
    def num_evictions(self) -> int:
        return self._evictions_before + self.table.num_evictions

    def cut(self, block_bytes: int) -> None:
        """Make sure that slots are for block_bytes. Raises Mismatch if they are not and somebody uses them."""
        if block_bytes == self.arena.block_bytes:
            return
        if not self.table.idle:
            raise Mismatch(
                f"the arena is in use with blocks of {self.arena.block_bytes} bytes, not {block_bytes}:"
                " workers of one agent must have the same model and block size"
            )
        self.arena.cut(block_bytes)
        self.table.clear()
        self._evictions_before += self.table.num_evictions
        self.table = SlotTable(self.arena.num_slots, on_sealed=self.held.add, on_gone=self.held.discard)
        self._num_cuts += 1
        log = logger.info if self._num_cuts == 1 else logger.warning  # two sizes in turns would each lose all blocks
        log("arena cut into %d slots of %s", self.arena.num_slots, format_size(self.arena.slot_bytes))

    def require_cut(self, agent_incarnation: str) -> None:
        """Raises Mismatch unless the caller has mapped the arena as it is now. "": it maps nothing."""
        if agent_incarnation and agent_incarnation != self.incarnation:
            raise Mismatch(f"the arena is {self.incarnation}, not {agent_incarnation}: attach again")
        if not self.arena.slot_bytes:
            raise Mismatch("nobody has attached yet: attach first")

    # --- writers ---

    def announce(self, names: Sequence[BlockHash], *, partial: bool = False) -> tuple[int, Announcement]:
        return self.table.announce(names, partial=partial)

    def count_hits(self, names: Sequence[BlockHash]) -> None:
        """Somebody asks for these."""
        self.counters.arena_hits += sum(map(self.table.is_sealed, names))

    def seal(self, lease_id: int, index: int, checksum: int, place: DirectPlace | None = None) -> None:
        name = self.table.seal(lease_id, index, checksum)
        if name is not None:
            self.counters.sealed_blocks += 1
            self.direct_places.put(name, place)
            for waiter in self._waiters.pop(name, ()):
                waiter.block_sealed(name)
            if self.on_sealed is not None:
                self.on_sealed(name)

    def abandon(self, lease_id: int, index: int, code: int) -> None:
        """The block will not come, for the reason that code gives to those who wait for it."""
        name = self.table.abandon(lease_id, index)
        if name is not None:
            self.give_up(name, code)

    def end_lease(self, lease_id: int, code: int) -> int:
        """Returns how many blocks were given up by it. Ending twice is harmless."""
        names = self.table.end_lease(lease_id)
        for name in names:
            self.give_up(name, code)
        return len(names)

    def give_up(self, name: BlockHash, code: int) -> None:
        """Tell those who wait for it that it is not to be waited for, whatever becomes of its slot."""
        for waiter in self._waiters.pop(name, ()):
            waiter.block_missing(name, code)

    # --- readers ---

    def wait_for(self, name: BlockHash, waiter: Waiter) -> None:
        """Exactly one call of the waiter follows, unless it forgets the name before."""
        assert self.table.is_granted(name)
        self._waiters.setdefault(name, set()).add(waiter)

    def forget(self, name: BlockHash, waiter: Waiter) -> None:
        """Stop waiting. Harmless when not waiting."""
        waiters = self._waiters.get(name)
        if waiters is not None:
            waiters.discard(waiter)
            if not waiters:
                del self._waiters[name]

    def check(self) -> None:
        self.table.check()
        assert all(waiters and self.table.is_granted(name) for name, waiters in self._waiters.items())

"""Which slot of the arena holds which block, who writes it and who reads it. Pure bookkeeping: no I/O, no clock.

    free ──announce──▶ granted (one lease) ──seal──▶ sealed (pinned n times) ──evict / drop──▶ free
                          └──────abandon, end of lease──────▶ free

A name is in at most one slot. A lease (a writer) pins, until it ends, the announced blocks that are sealed, by itself
or before: what it announced does not vanish while it is at work. Unpinned sealed blocks are evicted, least recently
used first, when slots are needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from relevo.core.block_hash import BlockHash
from relevo.core.errors import Exhausted, InvalidRequest


@dataclass(frozen=True, slots=True)
class Announcement:
    """The answer to a writer. Announced blocks in neither are being written by somebody else, or had no room."""

    granted: dict[int, int]  # index → slot
    sealed: tuple[int, ...]  # indices


@dataclass(frozen=True, slots=True)
class Pinned:
    """What a reader may read."""

    slot: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Held:
    """A block that is here, for people who look."""

    name: BlockHash
    num_pins: int
    is_granted: bool


@dataclass(frozen=True, slots=True)
class Audit:
    """num_free + num_granted + num_sealed == num_slots, always."""

    num_slots: int
    num_free: int
    num_granted: int
    num_sealed: int  # pinned ones included
    num_pinned: int
    num_leases: int
    num_readers: int


@dataclass(slots=True, eq=False)
class _Block:
    name: BlockHash
    slot: int
    checksum: int | None = None  # None: granted
    num_pins: int = 0
    dropped: bool = False  # no longer found by name; its slot is free when the last pin goes


@dataclass(slots=True, eq=False)
class _Lease:
    names: tuple[BlockHash, ...]
    granted: dict[int, _Block] = field(default_factory=dict)  # by index, still to be sealed
    pinned: dict[int, _Block] = field(default_factory=dict)  # by index, sealed


class SlotTable:
    """Owns the slots [0, num_slots). Leases and readers are numbers that it gives out.

    on_sealed, on_gone: called with each name that can be found from now on, or no more.
    """

    def __init__(
        self,
        num_slots: int,
        on_sealed: Callable[[BlockHash], None] | None = None,
        on_gone: Callable[[BlockHash], None] | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.num_evictions = 0
        self._on_sealed = on_sealed
        self._on_gone = on_gone
        self._free = list(range(num_slots - 1, -1, -1))  # taken from the end: low slots first
        self._blocks: dict[BlockHash, _Block] = {}
        self._evictable: OrderedDict[BlockHash, _Block] = OrderedDict()  # sealed, unpinned; least recently used first
        self._dropped: set[_Block] = set()  # pinned still
        self._leases: dict[int, _Lease] = {}
        self._readers: dict[int, dict[BlockHash, _Block]] = {}
        self._next_id = 1

    # --- writers ---

    def announce(self, names: Sequence[BlockHash], *, partial: bool = False) -> tuple[int, Announcement]:
        """A new lease with a slot for every name that is not here. All or nothing: Exhausted if they do not fit.

        partial: as many of them as fit, the first ones.
        """
        if len(set(names)) != len(names):
            raise InvalidRequest("a block is announced twice: names must be distinct", "block_hashes")
        missing = [index for index, name in enumerate(names) if name not in self._blocks]
        sealed = [index for index, name in enumerate(names) if self.is_sealed(name)]
        num_obtainable = self.num_obtainable(names[index] for index in sealed)
        if partial:
            missing = missing[: max(0, num_obtainable)]
        elif len(missing) > num_obtainable:
            raise Exhausted(
                f"{len(missing)} slots are needed, {num_obtainable} of {self.num_slots} can be had:"
                " the others are being written or read"
            )
        lease = _Lease(tuple(names))
        for index in sealed:
            lease.pinned[index] = self._pin(self._blocks[names[index]])
        for index in missing:
            block = _Block(names[index], self._take_slot())
            self._blocks[block.name] = lease.granted[index] = block
        lease_id = self._new_id()
        self._leases[lease_id] = lease
        return lease_id, Announcement({index: block.slot for index, block in lease.granted.items()}, tuple(sealed))

    def num_obtainable(self, names: Iterable[BlockHash]) -> int:
        """Slots that can be had without losing one of these names."""
        return len(self._free) + len(self._evictable) - sum(name in self._evictable for name in names)

    def seal(self, lease_id: int, index: int, checksum: int) -> BlockHash | None:
        """The block is written; returns its name, or None if the lease had sealed it before."""
        lease = self._leases[lease_id]
        block = lease.granted.pop(index, None)
        if block is None:
            if index in lease.pinned:
                return None
            raise InvalidRequest(f"block {index} was not granted to this writer", "index")
        block.checksum = checksum
        lease.pinned[index] = self._pin(block)
        if self._on_sealed is not None:
            self._on_sealed(block.name)
        return block.name

    def abandon(self, lease_id: int, index: int) -> BlockHash | None:
        """The block will not be written: its slot is free. Returns its name, or None if it was not to be written."""
        block = self._leases[lease_id].granted.pop(index, None)
        if block is None:
            return None
        del self._blocks[block.name]
        self._free.append(block.slot)
        return block.name

    def end_lease(self, lease_id: int) -> list[BlockHash]:
        """Free what was not sealed, unpin the rest; returns the names given up. Ending twice is harmless."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return []
        names = [name for index in list(lease.granted) if (name := self.abandon(lease_id, index)) is not None]
        # A prompt's last blocks become the least recently used: without the first ones they are worth nothing.
        for index in sorted(lease.pinned, reverse=True):
            self._unpin(lease.pinned[index])
        del self._leases[lease_id]
        return names

    # --- readers ---

    def open_reader(self) -> int:
        reader_id = self._new_id()
        self._readers[reader_id] = {}
        return reader_id

    def is_sealed(self, name: BlockHash) -> bool:
        block = self._blocks.get(name)
        return block is not None and block.checksum is not None

    def is_here(self, name: BlockHash) -> bool:
        """Sealed, or on its way."""
        return name in self._blocks

    def is_granted(self, name: BlockHash) -> bool:
        block = self._blocks.get(name)
        return block is not None and block.checksum is None

    def pin(self, reader_id: int, name: BlockHash) -> Pinned:
        """Pin a sealed block for a reader, which has not pinned it yet."""
        pins = self._readers[reader_id]
        assert name not in pins
        block = pins[name] = self._pin(self._blocks[name])
        assert block.checksum is not None
        return Pinned(block.slot, block.checksum)

    def has_pinned_slot(self, reader_id: int, slot: int) -> bool:
        return any(block.slot == slot for block in self._readers.get(reader_id, {}).values())

    def num_pins(self, reader_id: int) -> int:
        return len(self._readers[reader_id])

    def release(self, reader_id: int, names: Iterable[BlockHash]) -> None:
        """Unpin. Releasing what is not pinned is harmless."""
        pins = self._readers[reader_id]
        for name in names:
            if (block := pins.pop(name, None)) is not None:
                self._unpin(block)

    def drop(self, reader_id: int, name: BlockHash) -> None:
        """The bytes that this reader has pinned under the name are wrong: nobody finds them from now on."""
        block = self._readers[reader_id].get(name)
        if block is not None and not block.dropped:
            self._forget(block)
            block.dropped = True
            self._dropped.add(block)
        self.release(reader_id, (name,))

    def close_reader(self, reader_id: int) -> None:
        """Unpin all of it. Closing twice is harmless."""
        if reader_id in self._readers:
            self.release(reader_id, list(reversed(self._readers[reader_id])))
            del self._readers[reader_id]

    # --- all ---

    def clear(self) -> tuple[int, int]:
        """Free what nobody writes or reads; how many blocks that were, and how many stay."""
        num_cleared = len(self._evictable)
        for block in self._evictable.values():
            self._forget(block)
            self._free.append(block.slot)
        self._evictable.clear()
        return num_cleared, len(self._blocks)

    def blocks(self) -> Iterator[Held]:
        """Those in use first, then the others, most recently used first."""
        for name, block in self._blocks.items():
            if name not in self._evictable:
                yield Held(name, block.num_pins, block.checksum is None)
        for name in reversed(self._evictable):
            yield Held(name, 0, False)

    def sealed_slots(self) -> list[int]:
        """Of the blocks that can be found."""
        return [block.slot for block in self._blocks.values() if block.checksum is not None]

    @property
    def idle(self) -> bool:
        """Nobody writes or reads."""
        return not self._leases and not self._readers

    def audit(self) -> Audit:
        num_granted = sum(len(lease.granted) for lease in self._leases.values())
        num_sealed = len(self._blocks) - num_granted + len(self._dropped)
        return Audit(
            num_slots=self.num_slots,
            num_free=len(self._free),
            num_granted=num_granted,
            num_sealed=num_sealed,
            num_pinned=num_sealed - len(self._evictable),
            num_leases=len(self._leases),
            num_readers=len(self._readers),
        )

    def check(self) -> None:
        """Assert every invariant. For tests, and whenever in doubt."""
        blocks = [*self._blocks.values(), *self._dropped]
        assert sorted([*self._free, *(block.slot for block in blocks)]) == list(range(self.num_slots))
        pins: dict[int, int] = {}
        pinned = [block for lease in self._leases.values() for block in lease.pinned.values()]
        pinned += [block for of_reader in self._readers.values() for block in of_reader.values()]
        for block in pinned:
            pins[block.slot] = pins.get(block.slot, 0) + 1
        granted = [block for lease in self._leases.values() for block in lease.granted.values()]
        assert {id(block) for block in granted} == {id(block) for block in blocks if block.checksum is None}
        assert len(granted) == len({id(block) for block in granted}), "a slot has two writers"
        for name, block in self._blocks.items():
            assert block.name == name and not block.dropped
        for block in blocks:
            assert block.num_pins == pins.get(block.slot, 0)
            assert block.checksum is not None or not block.num_pins
            evictable = block.checksum is not None and not block.num_pins
            assert (self._evictable.get(block.name) is block) == evictable
            assert not (block.dropped and evictable), "a dropped block without pins must be free"
        assert len(self._evictable) <= len(self._blocks)

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _take_slot(self) -> int:
        if not self._free:
            _, block = self._evictable.popitem(last=False)
            self._forget(block)
            self._free.append(block.slot)
            self.num_evictions += 1
        return self._free.pop()

    def _forget(self, block: _Block) -> None:
        """A sealed block is found by its name no more."""
        del self._blocks[block.name]
        if self._on_gone is not None:
            self._on_gone(block.name)

    def _pin(self, block: _Block) -> _Block:
        block.num_pins += 1
        if not block.dropped:
            self._evictable.pop(block.name, None)
        return block

    def _unpin(self, block: _Block) -> None:
        block.num_pins -= 1
        assert block.num_pins >= 0
        if block.num_pins:
            return
        if block.dropped:
            self._dropped.remove(block)
            self._free.append(block.slot)
        else:
            self._evictable[block.name] = block

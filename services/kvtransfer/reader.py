"""One reader's stream: which blocks it waits for, which it has been shown and holds."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc

from relevo.core.block_hash import BlockHash
from relevo.core.errors import InvalidRequest
from services.kvtransfer.direct_places import DirectPlace
from services.kvtransfer.store import Store
from services.kvtransfer.transports.wire import TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class BlockRef:
    index: int
    slot: int
    checksum: int
    place: DirectPlace | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    index: int
    code: int


class Reader:
    """Every block is answered exactly once: as a BlockRef, pinned from that moment, or as Missing."""

    def __init__(self, store: Store, names: Sequence[BlockHash]) -> None:
        if len(set(names)) != len(names):
            raise InvalidRequest("a block is asked for twice: names must be distinct", "block_hashes")
        self.token = secrets.token_bytes(TOKEN_BYTES)  # tells the data port which slots are pinned
        self._store = store
        self._names = names
        self._id = store.table.open_reader()
        self._table = store.table
        self._waiting: dict[BlockHash, int] = {}  # name → index
        self._refs: list[BlockRef] = []  # answered and not yet taken; bounded by the number of names
        self._missing: list[Missing] = []
        self._changed = asyncio.Event()
        self._slot_of: dict[int, int] = {}  # index → slot, of what is pinned
        self._pinned_slots: set[int] = set()  # the same slots, for data threads to ask

    @property
    def all_answered(self) -> bool:
        return not self._waiting

    @property
    def finished(self) -> bool:
        """All answered, and nothing pinned."""
        return not self._waiting and not self._refs and not self._table.num_pins(self._id)

    def request(self, indices: Iterable[int]) -> None:
        """Answer these, now or when their writer is done. What nobody writes is NOT_FOUND."""
        for index in indices:
            name = self._names[index]
            if self._table.is_sealed(name):
                self._show(name, index)
            elif self._table.is_granted(name):
                self._waiting[name] = index
                self._store.wait_for(name, self)
            else:
                self._miss(index, grpc.StatusCode.NOT_FOUND.value[0])
        self._changed.set()

    def give_up(self, indices: Iterable[int], code: grpc.StatusCode) -> None:
        """Answer these as missing: there is no use in waiting."""
        for index in indices:
            self._waiting.pop(self._names[index], None)
            self._store.forget(self._names[index], self)
            self._miss(index, code.value[0])
        self._changed.set()

    def wake(self) -> None:
        self._changed.set()

    def expire(self) -> None:
        """The time is over for all that is not answered."""
        self.give_up(list(self._waiting.values()), grpc.StatusCode.DEADLINE_EXCEEDED)

    def block_sealed(self, name: BlockHash) -> None:
        self._show(name, self._waiting.pop(name))
        self._changed.set()

    def block_missing(self, name: BlockHash, code: int) -> None:
        self._miss(self._waiting.pop(name), code)
        self._changed.set()

    async def wait(self) -> None:
        """Until something may have changed since the last wait: answers, or releases."""
        await self._changed.wait()
        self._changed.clear()

    def take(self, limit: int) -> tuple[list[BlockRef], list[Missing]]:
        """Up to limit of each kind of answers not yet taken."""
        refs, self._refs = self._refs[:limit], self._refs[limit:]
        missing, self._missing = self._missing[:limit], self._missing[limit:]
        return refs, missing

    def has_pinned_slot(self, slot: int) -> bool:
        """From any thread."""
        return slot in self._pinned_slots

    def release(self, indices: Sequence[int], corrupt: Sequence[int]) -> None:
        if any(index >= len(self._names) for index in (*indices, *corrupt)):
            raise InvalidRequest(f"only {len(self._names)} blocks were asked for", "indices")
        for index in corrupt:
            self._store.counters.corrupt_blocks += 1
            self._table.drop(self._id, self._names[index])
        # A prompt's last blocks become the least recently used: without the first ones they are worth nothing.
        self._table.release(self._id, (self._names[index] for index in sorted(indices, reverse=True)))
        for index in (*indices, *corrupt):
            self._pinned_slots.discard(self._slot_of.pop(index, -1))
        self._changed.set()

    def close(self) -> None:
        for name in self._waiting:
            self._store.forget(name, self)
        self._waiting.clear()
        self._pinned_slots.clear()
        self._table.close_reader(self._id)

    def _show(self, name: BlockHash, index: int) -> None:
        pinned = self._table.pin(self._id, name)
        self._store.counters.fetched_blocks += 1
        self._slot_of[index] = pinned.slot
        self._pinned_slots.add(pinned.slot)
        place = self._store.direct_places.find(name)
        self._refs.append(BlockRef(index, pinned.slot, pinned.checksum, place))

    def _miss(self, index: int, code: int) -> None:
        counts = self._store.counters.missing_blocks
        label = next((status.name for status in grpc.StatusCode if status.value[0] == code), str(code))
        counts[label] = counts.get(label, 0) + 1
        self._missing.append(Missing(index, code))

"""Who waits for the fleet, and who is next: priorities first, then fair shares between clients.

Within one priority it is start-time fair queueing (Goyal, Vin, Cheng 1996): an entry starts, in virtual time, when its
client's entry before it has finished, or now; it takes cost / weight; and the earliest start is next. So of two clients
that always have something waiting, each gets its weight's share of what is served, up to one entry's cost, however much
the other one sends; and who sends rarely waits for no backlog but its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_SLACK = 64  # entries that were taken out of the middle may stay in the heap


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """priority: the lowest is next. start, finish: in its priority's virtual time"""

    item: T
    client: str
    priority: int
    start: float
    finish: float
    number: int
    is_queued: bool = True

    @property
    def order(self) -> tuple[int, float, int]:
        return (self.priority, self.start, self.number)

    def __lt__(self, other: Entry[T]) -> bool:
        return self.order < other.order


@dataclass(slots=True)
class _Lane:
    """Entries of one priority. now: virtual time. last_finish: by client; of those that have had entries here"""

    now: float = 0.0
    num_entries: int = 0
    last_finish: dict[str, float] = field(default_factory=dict)


class FairQueue(Generic[T]):
    """At most max_entries wait. A newcomer that would be before the last one takes its place when all are taken."""

    def __init__(self, max_entries: int) -> None:
        self.max_entries = max_entries
        self._heap: list[Entry[T]] = []
        self._lanes: dict[int, _Lane] = {}  # of priorities that somebody waits with
        self._num_entries = 0
        self._next_number = 0

    def __len__(self) -> int:
        return self._num_entries

    def __iter__(self) -> Iterator[Entry[T]]:
        """In no order."""
        return (entry for entry in self._heap if entry.is_queued)

    def push(
        self,
        item: T,
        client: str,
        *,
        priority: int = 0,
        weight: float = 1.0,
        cost: float = 1.0,
        keep: Entry[T] | None = None,
    ) -> tuple[Entry[T] | None, Entry[T] | None]:
        """The new entry, or None if there is no room for it; and the one that lost its place to it, if one did.

        keep: does not lose it
        """
        lane = self._lanes.get(priority, _Lane())
        start = max(lane.now, lane.last_finish.get(client, 0.0))
        entry = Entry(item, client, priority, start, start + cost / weight, self._next_number)
        last = None
        if self._num_entries >= self.max_entries:
            last = max((each for each in self if each is not keep), default=None)
            if last is None or last < entry:
                return None, None
            self.remove(last)
        lane = self._lanes.setdefault(priority, lane)  # it may have been last's, and gone with it
        lane.num_entries += 1
        lane.last_finish[client] = entry.finish
        self._next_number += 1
        self._num_entries += 1
        heapq.heappush(self._heap, entry)
        return entry, last

    def peek(self) -> Entry[T] | None:
        """Who is next."""
        while self._heap and not self._heap[0].is_queued:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def serve(self, entry: Entry[T]) -> None:
        """Take it out: it has got what it waited for."""
        if entry.is_queued:
            lane = self._lanes[entry.priority]
            lane.now = max(lane.now, entry.start)
            self._take_out(entry)

    def remove(self, entry: Entry[T]) -> None:
        """Take it out unserved. Twice, or after serve(), is harmless."""
        if entry.is_queued:
            lane = self._lanes[entry.priority]
            if lane.last_finish[entry.client] == entry.finish:  # its client's last: it is as if it had not come
                lane.last_finish[entry.client] = entry.start
            self._take_out(entry)

    def _take_out(self, entry: Entry[T]) -> None:
        entry.is_queued = False
        self._num_entries -= 1
        lane = self._lanes[entry.priority]
        lane.num_entries -= 1
        if not lane.num_entries:
            del self._lanes[entry.priority]
        if len(self._heap) > 2 * self._num_entries + _SLACK:
            self._heap = list(self)
            heapq.heapify(self._heap)

"""Which blocks a worker or an agent holds, for everybody who watches: a snapshot, then what changed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

from relevo.core.block_hash import HASH_BYTES, BlockHash
from relevo.core.errors import RelevoError, Unavailable
from services.pb import messages_pb2, worker_pb2

MAX_NAMES_PER_MESSAGE = 16384  # 512 KiB of names: well under the 1 MiB that a message may have
MAX_PENDING_EVENTS = 256  # per watcher, each at most a message; a watcher further behind is cut off
LOAD_INTERVAL_SECONDS = 1.0


class TooSlow(RelevoError):
    """A watcher is too far behind. It starts again, with a new snapshot."""

    grpc_code = "ABORTED"


class BlockEvents:
    """The names held now, and the watchers that are told of changes.

    Belongs to the loop that calls apply() and watch(); never waits for a watcher.
    """

    def __init__(
        self,
        load: Callable[[], messages_pb2.Load],
        *,
        load_interval_seconds: float = LOAD_INTERVAL_SECONDS,
        max_pending_events: int = MAX_PENDING_EVENTS,
    ) -> None:
        self._load = load
        self._load_interval_seconds = load_interval_seconds
        self._max_pending_events = max_pending_events
        self._names: dict[BlockHash, None] = {}  # in order of storing
        self._sequence = 0
        self._watchers: set[_Watcher] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._names)

    @property
    def sequence(self) -> int:
        return self._sequence

    def apply(self, removed: Sequence[BlockHash], stored: Sequence[BlockHash]) -> None:
        """Account for a step's changes: `removed` first, then `stored`."""
        for name in removed:
            self._names.pop(name, None)
        self._names.update(dict.fromkeys(stored))
        for names, field in ((removed, "removed"), (stored, "stored")):
            for part in _parts(names):
                self._sequence += 1
                delta = worker_pb2.Delta(**{field: part})
                self._publish(worker_pb2.BlockEvents(sequence=self._sequence, delta=delta))

    def tell_load(self) -> None:
        """To every watcher, now."""
        for watcher in self._watchers:
            watcher.wake()

    def close(self) -> None:
        """The worker goes away: every watcher's stream ends with UNAVAILABLE."""
        self._closed = True
        for watcher in list(self._watchers):
            self._end(watcher, Unavailable("the worker is shutting down"))

    async def watch(self) -> AsyncGenerator[worker_pb2.BlockEvents, None]:
        """A snapshot, then deltas as they come, and the load at least every load_interval_seconds.

        Raises TooSlow when the reader falls too far behind, Unavailable at close().
        """
        if self._closed:
            raise Unavailable("the worker is shutting down")
        # Snapshot and registration happen in one go, so that no delta falls between.
        watcher = _Watcher(self._max_pending_events)
        self._watchers.add(watcher)
        sequence, parts = self._sequence, list(_parts(list(self._names))) or [b""]
        try:
            for index, part in enumerate(parts):
                snapshot = worker_pb2.Snapshot(block_hashes=part, first=index == 0, last=index == len(parts) - 1)
                yield worker_pb2.BlockEvents(sequence=sequence, snapshot=snapshot, load=self._load())
            while True:
                event = await watcher.next(self._load_interval_seconds)
                message = worker_pb2.BlockEvents(sequence=sequence, load=self._load())
                if event is not None:
                    message.MergeFrom(event)
                    sequence = event.sequence
                yield message
        finally:
            self._watchers.discard(watcher)

    def _publish(self, event: worker_pb2.BlockEvents) -> None:
        for watcher in list(self._watchers):
            if not watcher.offer(event):
                self._end(watcher, TooSlow(f"more than {self._max_pending_events} block events behind: watch again"))

    def _end(self, watcher: _Watcher, error: RelevoError) -> None:
        self._watchers.discard(watcher)
        watcher.end(error)


class _Watcher:
    """One watcher's pending events: bounded, and when full the watcher ends rather than the engine waits."""

    def __init__(self, max_pending_events: int) -> None:
        self._pending: asyncio.Queue[worker_pb2.BlockEvents] = asyncio.Queue(max_pending_events)
        self._error: RelevoError | None = None
        self._changed = asyncio.Event()

    def offer(self, event: worker_pb2.BlockEvents) -> bool:
        if self._pending.full():
            return False
        self._pending.put_nowait(event)
        self._changed.set()
        return True

    def wake(self) -> None:
        self._changed.set()

    def end(self, error: RelevoError) -> None:
        self._error = error
        self._changed.set()

    async def next(self, timeout_seconds: float) -> worker_pb2.BlockEvents | None:
        """The next event; None when there was none for that long, or at wake(). Raises what it was ended with."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()
        except TimeoutError:
            return None
        if self._error is not None:
            raise self._error
        event = self._pending.get_nowait() if not self._pending.empty() else None
        if self._pending.empty():
            self._changed.clear()
        return event


def _parts(names: Sequence[BlockHash]) -> Iterator[bytes]:
    for start in range(0, len(names), MAX_NAMES_PER_MESSAGE):
        part = b"".join(names[start : start + MAX_NAMES_PER_MESSAGE])
        assert len(part) % HASH_BYTES == 0
        yield part

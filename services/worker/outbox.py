"""Updates on their way to a router: collected while one message is written, sent together in the next."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

UpdateT = TypeVar("UpdateT")

MAX_MESSAGE_BYTES = 512 * 1024  # a message is sent before it grows beyond this; gRPC's limit is 1 MiB
MAX_PENDING_BYTES = 16 * 1024 * 1024  # updates a router may be behind before its stream is cut off


class Outbox(Generic[UpdateT]):
    """A queue of updates with a bound in bytes. Full means the router reads too slowly: put() says so, nobody waits."""

    def __init__(self, max_pending_bytes: int = MAX_PENDING_BYTES) -> None:
        self._max_pending_bytes = max_pending_bytes
        self._pending: deque[tuple[UpdateT, int]] = deque()
        self._pending_bytes = 0
        self._closed = False
        self._changed = asyncio.Event()

    def put(self, update: UpdateT, num_bytes: int) -> bool:
        """Queue an update; False, and nothing queued, if the bound would be passed. Dropped once closed."""
        if self._closed:
            return True
        if self._pending_bytes + num_bytes > self._max_pending_bytes:
            return False
        self._pending.append((update, num_bytes))
        self._pending_bytes += num_bytes
        self._changed.set()
        return True

    def close(self, *, discard: bool = False) -> None:
        """No more updates. Those that are queued are still taken, unless discarded."""
        self._closed = True
        if discard:
            self._pending.clear()
            self._pending_bytes = 0
        self._changed.set()

    async def take(self) -> list[UpdateT]:
        """Wait for updates and take all that fit into one message; empty once closed and drained."""
        while not self._pending and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        taken: list[UpdateT] = []
        message_bytes = 0
        while self._pending and (not taken or message_bytes + self._pending[0][1] <= MAX_MESSAGE_BYTES):
            update, num_bytes = self._pending.popleft()
            taken.append(update)
            message_bytes += num_bytes
        self._pending_bytes -= message_bytes
        return taken

"""What workers say about one request, in the order in which it came, until the request asks."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from relevo.core.errors import Cancelled, RelevoError

MAX_PENDING_ITEMS = 4096

T = TypeVar("T")


class Inbox(Generic[T]):
    """A bounded queue for one reader, which takes all that is there at once.

    When it is full the reader is thousands of steps behind: the inbox fails with Cancelled, which ends this request
    and no other. Belongs to one event loop.
    """

    def __init__(self, max_pending_items: int = MAX_PENDING_ITEMS) -> None:
        self._items: deque[T] = deque()
        self._max_pending_items = max_pending_items
        self._error: RelevoError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: T) -> bool:
        """False if it was not taken in: the inbox has failed, perhaps just now because it was full."""
        if len(self._items) >= self._max_pending_items:
            self.fail(Cancelled(f"the client reads too slowly: it is {len(self._items)} updates behind"))
        if self._error is not None:
            return False
        self._items.append(item)
        self._wake()
        return True

    def fail(self, error: RelevoError) -> None:
        """The reader gets what is pending, then the error, which is the last word: a second one is not heard."""
        if self._error is None:
            self._error = error
            self._wake()

    async def take(self) -> list[T]:
        """Everything pending; waits until there is something. Raises the error once nothing is pending."""
        while not self._items:
            if self._error is not None:
                raise self._error
            assert self._waiter is None, "an inbox has one reader"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items = list(self._items)
        self._items.clear()
        return items

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

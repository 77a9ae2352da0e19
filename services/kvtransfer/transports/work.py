"""Between the event loop and the threads that move bytes: one pull, and who is at work on it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from relevo.core.errors import Unavailable
from services.kvtransfer.transports import Outcome, WantedBlock

_TELL_SECONDS = 0.008
_DRAIN_SECONDS = 1.0  # what a pull that was cancelled waits for the bytes that are under way, before it cuts them off


class PullWork:
    """Blocks to be fetched by one or more threads, which each take the next one.

    Threads call begin, take, answer, end or fail. It has ended when nobody is at work any more, and nothing is left to
    take: all taken, cancelled, or failed.
    """

    def __init__(self, token: bytes, blocks: Sequence[WantedBlock], answered: Callable[[int, Outcome], None]) -> None:
        self.token = token
        self.blocks = blocks
        self._answered = answered
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._lock = threading.Lock()
        self._next = 0
        self._num_working = 0
        self._is_cancelled = False
        self._error: Exception | None = None
        self._told = time.monotonic()
        self._answers: deque[tuple[int, Outcome]] = deque()  # to be told in the loop; bounded by the number of blocks

    # --- in threads ---

    def begin(self) -> bool:
        """False: there is nothing to do."""
        with self._lock:
            if not self._is_left():
                return False
            self._num_working += 1
            return True

    def take(self) -> int | None:
        """The next block's index, for whoever has begun; None: no more."""
        with self._lock:
            if not self._is_left():
                return None
            self._next += 1
            return self._next - 1

    def answer(self, index: int, outcome: Outcome) -> None:
        """The loop hears of it soon, together with others: each time costs it, and whoever reads, more than a block."""
        self._answers.append((index, outcome))
        if time.monotonic() - self._told >= _TELL_SECONDS:
            self._told = time.monotonic()
            self._call(self._tell)

    def end(self, error: Exception | None = None) -> None:
        """Whoever has begun writes into no block any more. error: why it did not finish what it took."""
        with self._lock:
            self._error = self._error or error
            self._num_working -= 1
        self._call(self._check_end)

    def fail(self, error: Exception) -> None:
        """Whoever should have begun cannot."""
        with self._lock:
            self._error = self._error or error
        self._call(self._check_end)

    # --- in the loop ---

    async def finish(self, cut_off: Callable[[], None]) -> None:
        """Until it has ended, also when cancelled: then what is under way may still come for a moment; cut_off breaks
        the connections after that. Raises Unavailable if a thread failed.
        """
        try:
            await self._ended.wait()
        except asyncio.CancelledError:
            with self._lock:
                self._is_cancelled = True
            self._check_end()
            timer = self._loop.call_later(_DRAIN_SECONDS, cut_off)
            while not self._ended.is_set():
                try:
                    await self._ended.wait()
                except asyncio.CancelledError:
                    continue  # once more: the answer stays the same, and the first one is raised below
            timer.cancel()
            raise
        if self._error is not None:
            raise Unavailable(str(self._error)) from self._error

    def _is_left(self) -> bool:
        return self._next < len(self.blocks) and not self._is_cancelled and self._error is None

    def _call(self, callback: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(callback)

    def _tell(self) -> None:
        while self._answers:
            self._answered(*self._answers.popleft())

    def _check_end(self) -> None:
        self._tell()
        with self._lock:
            if not self._num_working and not self._is_left():
                self._ended.set()

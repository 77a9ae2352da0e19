"""How fast the router's queue moves, and so how long one who comes now would wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

MAX_WAIT_SECONDS = 600.0
_NUM_REMEMBERED = 64


class Backlog:
    """clock: seconds, never going back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._hint_seconds = 1.0
        # When the queue began or, later, when one left it; and then the next ones. Empty while nobody waits.
        self._moved_at: deque[float] = deque(maxlen=_NUM_REMEMBERED)

    def hint(self, seconds: float) -> None:
        """What a worker said; counts until the queue has moved. 0: it did not know."""
        if seconds > 0:
            self._hint_seconds = seconds

    def queued(self) -> None:
        if not self._moved_at:
            self._moved_at.append(self._clock())

    def admitted(self) -> None:
        self._moved_at.append(self._clock())

    def emptied(self) -> None:
        self._moved_at.clear()

    def wait_seconds(self, num_waiting: int) -> float:
        """Until so many have gone in. The time since the last one did counts: a queue that stands still is slow."""
        if len(self._moved_at) < 2:
            return self._hint_seconds
        interval = (self._clock() - self._moved_at[0]) / (len(self._moved_at) - 1)
        return min(MAX_WAIT_SECONDS, max(1, num_waiting) * interval)

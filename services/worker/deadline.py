"""A request's deadline: one timer, stopped at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from relevo.core.errors import DeadlineExceeded, RelevoError


class Deadline:
    """Cancels a request with DeadlineExceeded when timeout_ms are over; 0 means never."""

    def __init__(self, timeout_ms: int, cancel: Callable[[RelevoError | None], None]) -> None:
        self._timer: asyncio.TimerHandle | None = None
        if timeout_ms:
            error = DeadlineExceeded(f"the request's deadline of {timeout_ms} ms is over")
            self._timer = asyncio.get_running_loop().call_later(timeout_ms / 1000, cancel, error)

    def stop(self) -> None:
        """Stopping twice is harmless."""
        if self._timer is not None:
            self._timer.cancel()

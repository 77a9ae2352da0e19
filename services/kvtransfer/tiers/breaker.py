"""Stops the use of what has failed, for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Breaker:
    """Closed: use it. Tripped: don't, until retry_seconds are over; the next use decides whether it stays tripped.

    One WARNING an outage, however often it is tried in vain, and one line at its end.
    """

    def __init__(self, what: str, retry_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.trouble = ""  # why it is tripped; "" = it is not
        self._what = what
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._retry_at = 0.0

    @property
    def is_open(self) -> bool:
        """Not to be used now."""
        return bool(self.trouble) and self._clock() < self._retry_at

    @property
    def seconds_left(self) -> float:
        """Until the next try; 0 if it may be used."""
        return max(0.0, self._retry_at - self._clock()) if self.trouble else 0.0

    def trip(self, reason: str) -> None:
        if not self.trouble:
            logger.warning("%s stopped: %s; tried again every %g s", self._what, reason, self._retry_seconds)
        self.trouble = reason
        self._retry_at = self._clock() + self._retry_seconds

    def succeeded(self) -> None:
        if self.trouble:
            logger.info("%s works again", self._what)
            self.trouble = ""

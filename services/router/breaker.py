"""Keeps requests from a worker that fails again and again, and finds out when it does no longer."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

MAX_FAILURES = 3
MAX_REFUSALS = 5
WINDOW_SECONDS = 30.0
OPEN_SECONDS = 2.0
MAX_OPEN_SECONDS = 60.0


class CircuitBreaker:
    """Of one address, over all processes that listen there one after another.

        closed     requests pass; what opens it: max_failures within window_seconds, or max_refusals in a row
        open       none passes, for open_seconds
        half-open  one passes, the trial: if it works the breaker closes, if it fails it is open for twice as long

    A failure: a connection that broke, went silent or was stuck, whatever was on it. A refusal: a request's only answer
    was UNAVAILABLE; among requests that work a few say nothing. A worker that says that it is draining does neither.
    Times are seconds, of any one clock.
    """

    def __init__(
        self,
        *,
        max_failures: int = MAX_FAILURES,
        max_refusals: int = MAX_REFUSALS,
        window_seconds: float = WINDOW_SECONDS,
        open_seconds: float = OPEN_SECONDS,
        max_open_seconds: float = MAX_OPEN_SECONDS,
    ) -> None:
        self._max_failures = max_failures
        self._max_refusals = max_refusals
        self._window_seconds = window_seconds
        self._first_open_seconds = open_seconds
        self._max_open_seconds = max_open_seconds
        self._open_seconds = open_seconds
        self._failures: deque[float] = deque(maxlen=max_failures)  # while closed: when
        self._num_refusals = 0  # in a row, the last ones
        self._half_open_at: float | None = None  # None: closed
        self._trial: Hashable | None = None

    @property
    def is_closed(self) -> bool:
        return self._half_open_at is None

    def allows(self, now: float) -> bool:
        """Whether a request may go there."""
        return self._half_open_at is None or (self._trial is None and now >= self._half_open_at)

    def sent(self, request: Hashable) -> None:
        """A request went there, allowed or because there was nowhere else. `request` names it in what follows."""
        if self._half_open_at is not None and self._trial is None:
            self._trial = request

    def worked(self, request: Hashable) -> None:
        """It brought a token, or ended well. Any number of times."""
        self._num_refusals = 0
        if self._trial is not None and request == self._trial:
            self._half_open_at = self._trial = None
            self._open_seconds = self._first_open_seconds
            self._failures.clear()

    def left(self, request: Hashable) -> None:
        """It has ended, and if nothing was said of it before, nobody knows whether it would have worked."""
        if request == self._trial:
            self._trial = None

    def failed(self, now: float) -> None:
        if self._half_open_at is None:
            self._failures.append(now)
            if len(self._failures) == self._max_failures and self._failures[0] > now - self._window_seconds:
                self._half_open_at = now + self._open_seconds
        else:
            self._open_again(now)

    def refused(self, request: Hashable, now: float) -> None:
        self._num_refusals += 1
        if self._half_open_at is None:
            if self._num_refusals >= self._max_refusals:
                self._half_open_at = now + self._open_seconds
        elif request == self._trial:  # others were sent before it opened
            self._open_again(now)

    def _open_again(self, now: float) -> None:
        if self._trial is not None:
            self._open_seconds = min(2 * self._open_seconds, self._max_open_seconds)
        assert self._half_open_at is not None
        self._half_open_at = max(self._half_open_at, now + self._open_seconds)
        self._trial = None

"""Drafts that may not pay, to see whether they do."""

from __future__ import annotations

CATCH_UP_STEPS = 3  # at the very most: a proposer reads what there is, which it does once
MAX_LOSS = 2.5  # plain steps, after those


class Trial:
    """Ends before its time where it has lost too much."""

    def __init__(self) -> None:
        self._is_on = False
        self._num_steps = 0
        self._seconds = 0.0  # saved

    def begin(self) -> None:
        self._is_on = True
        self._num_steps, self._seconds = 0, 0.0

    def end(self) -> None:
        self._is_on = False

    def add(self, saved_seconds: float) -> None:
        """What a step's drafts have saved, or cost."""
        self._num_steps += 1
        if self._num_steps > CATCH_UP_STEPS:
            self._seconds += saved_seconds

    def has_failed(self, plain_seconds: float) -> bool:
        """plain_seconds: of a step without drafts"""
        return self._is_on and self._seconds < -MAX_LOSS * plain_seconds

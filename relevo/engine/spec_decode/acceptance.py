"""How likely a draft is accepted, measured as tokens are."""

from __future__ import annotations

FIRST_GUESS = 0.7
REQUEST_MEMORY, SHARED_MEMORY = 0.9, 0.99  # what of older drafts counts after each step that had some
SHARED_WEIGHT = 4.0  # drafts that the shared rate stands for, beside a request's own
IDLE_MEMORY = 0.98  # and after a step without: what was bad may have become better


class SharedAcceptance:
    """Of all requests: what a new one starts with."""

    def __init__(self) -> None:
        self.rate = FIRST_GUESS
        self._accepted, self._tried = FIRST_GUESS * SHARED_WEIGHT, SHARED_WEIGHT

    def add(self, num_drafts: int, num_accepted: int) -> None:
        self._accepted = SHARED_MEMORY * self._accepted + num_accepted
        self._tried = SHARED_MEMORY * self._tried + num_tried(num_drafts, num_accepted)
        self.rate = self._accepted / self._tried


class Acceptance:
    """Of one request. rate: the chance of a draft whose predecessors were accepted."""

    def __init__(self, shared: SharedAcceptance) -> None:
        self._shared = shared
        self._accepted = self._tried = 0.0

    @property
    def rate(self) -> float:
        return (self._accepted + SHARED_WEIGHT * self._shared.rate) / (self._tried + SHARED_WEIGHT)

    def add(self, num_drafts: int, num_accepted: int) -> None:
        self._accepted = REQUEST_MEMORY * self._accepted + num_accepted
        self._tried = REQUEST_MEMORY * self._tried + num_tried(num_drafts, num_accepted)

    def idle(self, num_steps: int) -> None:
        """So many steps had no drafts for it."""
        memory = IDLE_MEMORY**num_steps
        self._accepted *= memory
        self._tried *= memory


def num_tried(num_drafts: int, num_accepted: int) -> int:
    """Drafts behind the first that was rejected were not put to the test."""
    return min(num_accepted + 1, num_drafts)

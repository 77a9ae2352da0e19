"""How long a step takes, and what one more request in the batch adds to it."""

from __future__ import annotations

WEIGHT = 0.1  # of the newest step in all means
_MIN_VARIANCE = 0.1  # of the batch size: below it there is nothing to tell a slope from


class StepTimes:
    """Exponentially weighted least squares of a step's duration over the number of requests in it.

    Of steps without prompts: one token a request.
    """

    def __init__(self) -> None:
        self.step_seconds = 0.0  # mean; 0 = not measured yet
        self._size = self._size_squared = self._product = 0.0

    @property
    def step_seconds_per_request(self) -> float:
        """The slope, at least 0; 0 also as long as all batches had one size."""
        variance = self._size_squared - self._size * self._size
        if variance < _MIN_VARIANCE:
            return 0.0
        return max(0.0, (self._product - self._size * self.step_seconds) / variance)

    def seconds(self, num_requests: int) -> float:
        """Of a step of so many."""
        return max(0.0, self.step_seconds + self.step_seconds_per_request * (num_requests - self._size))

    def add(self, num_requests: int, seconds: float) -> None:
        weight = WEIGHT if self.step_seconds else 1.0
        self.step_seconds += weight * (seconds - self.step_seconds)
        self._size += weight * (num_requests - self._size)
        self._size_squared += weight * (num_requests * num_requests - self._size_squared)
        self._product += weight * (num_requests * seconds - self._product)

"""Seconds of a pass by the number of its rows, learned from every pass."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

OWN_WEIGHT = 0.2  # of a new measurement, at the rows where it was made
SHARED_WEIGHT = 0.01  # at all others: the machine has become slower or faster as a whole
MAX_RATIO = 2.0  # one pass that took far longer (a core was lost, something was compiled) says little


class RowCosts:
    """A line through points, measured once and kept true from then on.

    A pass costs next to the same from one row to where it is bound by arithmetic and no longer by memory, and then more
    with each row; where that is depends on model, machine and context. So it is measured, not assumed.
    """

    def __init__(self, measured: Mapping[int, float]) -> None:
        """measured: seconds by rows; at least two."""
        assert len(measured) >= 2
        self._rows = sorted(measured)
        self._seconds = [measured[rows] for rows in self._rows]
        for at in range(1, len(self._rows)):  # more rows don't cost less, whatever noise says
            self._seconds[at] = max(self._seconds[at], self._seconds[at - 1])

    def seconds(self, rows: float) -> float:
        """Beyond the last point the line goes on as between the last two."""
        at = self._segment(rows)
        low, high = self._rows[at], self._rows[at + 1]
        share = (rows - low) / (high - low)
        return self._seconds[at] + share * (self._seconds[at + 1] - self._seconds[at])

    def add(self, rows: int, seconds: float) -> None:
        ratio = seconds / self.seconds(rows)
        ratio = min(max(ratio, 1 / MAX_RATIO), MAX_RATIO)
        everywhere = 1 + SHARED_WEIGHT * (ratio - 1)
        self._seconds = [value * everywhere for value in self._seconds]
        at = self._segment(rows)
        low, high = self._rows[at], self._rows[at + 1]
        share = min(1.0, max(0.0, (rows - low) / (high - low)))
        for point, weight in ((at, 1 - share), (at + 1, share)):
            self._seconds[point] *= 1 + OWN_WEIGHT * weight * (ratio - 1)

    def _segment(self, rows: float) -> int:
        return min(max(bisect_right(self._rows, rows) - 1, 0), len(self._rows) - 2)

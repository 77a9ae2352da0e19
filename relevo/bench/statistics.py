"""Percentiles of what was measured, and how much of it kept a promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request is promised; None: nothing. Milliseconds."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def is_set(self) -> bool:
        return self.ttft_ms is not None or self.tpot_ms is not None

    def is_met(self, ttft_ms: float, tpot_ms: float | None) -> bool:
        """tpot_ms: None for an answer of one token, which has none to be late with."""
        if self.ttft_ms is not None and ttft_ms > self.ttft_ms:
            return False
        return self.tpot_ms is None or tpot_ms is None or tpot_ms <= self.tpot_ms


def percentile(values: Sequence[float], percent: int) -> float:
    """Nearest rank: the least value that at least `percent` % of the values do not exceed. 0 of no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, min(len(ordered), rank) - 1)]


def mean(values: Sequence[float]) -> float:
    """0 of no values."""
    return sum(values) / len(values) if values else 0.0


def summary(name: str, values: Sequence[float]) -> dict[str, float]:
    """{"name_mean": …, "name_p50": …, "name_p90": …, "name_p99": …}."""
    percentiles = {f"{name}_p{percent}": percentile(values, percent) for percent in (50, 90, 99)}
    return {f"{name}_mean": mean(values), **percentiles}

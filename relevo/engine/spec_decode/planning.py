"""How many drafts each request gets, so that a step brings the most tokens a second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# A draft is worth its row while the chance that it and all before it are accepted is above a threshold, the same for
# all requests: at the best one no draft could be given to another request with more gain.
THRESHOLDS = tuple(0.95 * 0.85**i for i in range(22))
RATE_STEPS = 50  # acceptance rates are taken as multiples of this
MIN_GAIN = 1.02  # what a plan must promise over none


@dataclass(frozen=True, slots=True)
class Plan:
    """num_drafts: by request, as they were given. gain: tokens a second, of those without drafts; 1: nobody has any."""

    num_drafts: list[int]
    gain: float


def best_plan(
    rates: Sequence[float],
    limits: Sequence[int],
    num_other_rows: int,
    verify_seconds: Callable[[float], float],
    propose_seconds: Callable[[float], float],
) -> Plan:
    """rates, limits: of each request that may have drafts: the chance of a draft behind accepted ones, most drafts

    num_other_rows: of requests in the step that have none
    verify_seconds: of the target's pass, by rows
    propose_seconds: of drafting one token each, by requests
    """
    groups = Counter(
        (min(round(rate * RATE_STEPS), RATE_STEPS - 1), limit) for rate, limit in zip(rates, limits, strict=True)
    )
    num_rows = len(rates) + num_other_rows
    plain = num_rows / verify_seconds(num_rows)
    best, best_depths = MIN_GAIN * plain, None
    seen = None
    for threshold in THRESHOLDS:
        depths = {group: _depth(group[0] / RATE_STEPS, group[1], threshold) for group in groups}
        if depths == seen:
            continue
        seen = depths
        rows = num_rows + sum(count * depths[group] for group, count in groups.items())
        seconds = verify_seconds(rows)
        for depth in range(max(depths.values(), default=0)):
            seconds += propose_seconds(sum(count for group, count in groups.items() if depths[group] > depth))
        gain = sum(count * _expected(group[0] / RATE_STEPS, depths[group]) for group, count in groups.items())
        if (num_rows + gain) / seconds > best:
            best, best_depths = (num_rows + gain) / seconds, depths
    if best_depths is None:
        return Plan([0] * len(rates), 1.0)
    num_drafts = [
        best_depths[min(round(rate * RATE_STEPS), RATE_STEPS - 1), limit]
        for rate, limit in zip(rates, limits, strict=True)
    ]
    return Plan(num_drafts, best / plain)


def _depth(rate: float, limit: int, threshold: float) -> int:
    """How many drafts have a chance above the threshold."""
    depth, chance = 0, rate
    while depth < limit and chance > threshold:
        depth += 1
        chance *= rate
    return depth


def _expected(rate: float, depth: int) -> float:
    """Accepted drafts of so many: rate + rate² + …"""
    return sum(rate**position for position in range(1, depth + 1))

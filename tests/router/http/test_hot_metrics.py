"""The figures of every token read like prometheus-client's own."""

from __future__ import annotations

import random

from prometheus_client import CollectorRegistry, Counter, Histogram

from services.common.telemetry import render_metrics
from services.router.http.hot_metrics import HotCounter, HotHistogram

BUCKETS = (0.001953125, 0.25, 0.5, 1, 8)  # like all values here sums of few powers of two: their sums are exact


def lines(registry: CollectorRegistry) -> list[str]:
    return [line for line in render_metrics(registry)[0].decode().splitlines() if "_created" not in line]


def test_what_is_shown_is_what_the_library_would_show() -> None:
    """Values on a bound belong to its bucket; those beyond all bounds count as well."""
    ours, theirs = CollectorRegistry(auto_describe=True), CollectorRegistry(auto_describe=True)
    tokens, seconds = (
        HotCounter("tokens", "T.", registry=ours),
        HotHistogram("seconds", "S.", buckets=BUCKETS, registry=ours),
    )
    counter = Counter("tokens", "T.", registry=theirs)
    histogram = Histogram("seconds", "S.", buckets=BUCKETS, registry=theirs)
    assert lines(ours) == lines(theirs)
    numbers = random.Random(0)
    for _ in range(500):
        value, count = numbers.choice((*BUCKETS, 0.0, 512.0, 2.0 ** numbers.randrange(-12, 5))), numbers.randrange(1, 4)
        tokens.value += count
        counter.inc(count)
        seconds.observe(value, count)
        for _ in range(count):
            histogram.observe(value)
    assert lines(ours) == lines(theirs)

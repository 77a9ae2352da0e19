"""A counter and a histogram for what happens with every token.

prometheus-client's own take a lock for each change, and a histogram's observation makes several: a twentieth of what
the router does for a token. These are changed by the event loop alone, and read by whoever shows /metrics, who may see
a change half done: a sum without its count, for one scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class HotCounter(Collector):
    """name: without _total"""

    def __init__(self, name: str, documentation: str, *, registry: CollectorRegistry) -> None:
        self.value = 0
        self._name, self._documentation = name, documentation
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(self._name, self._documentation, value=self.value)


class HotHistogram(Collector):
    """buckets: upper bounds, ascending, without infinity"""

    def __init__(self, name: str, documentation: str, *, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._buckets = tuple(buckets)
        self._counts = [0] * (len(buckets) + 1)  # the last one: beyond all bounds
        self._sum = 0.0
        self._name, self._documentation = name, documentation
        registry.register(self)

    def observe(self, value: float, count: int = 1) -> None:
        """The same value so many times."""
        self._counts[bisect_left(self._buckets, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[Metric]:
        bounds = [*map(floatToGoString, self._buckets), "+Inf"]
        rows = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=rows, sum_value=self._sum)

"""The agent's figures for Prometheus, read from the store when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.kvtransfer.store import Store


class StoreCollector(Collector):
    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        audit = self._store.table.audit()
        slots = GaugeMetricFamily("relevo_kv_slots", "Slots of the arena by state", labels=["state"])
        for state, count in (
            ("free", audit.num_free),
            ("granted", audit.num_granted),
            ("cached", audit.num_sealed - audit.num_pinned),
            ("pinned", audit.num_pinned),
        ):
            slots.add_metric([state], count)
        yield slots
        yield GaugeMetricFamily("relevo_kv_leases", "Writers' streams, and pulls", value=audit.num_leases)
        yield GaugeMetricFamily("relevo_kv_fetches", "Readers' streams", value=audit.num_readers)
        counters = self._store.counters
        for name, text, value in (
            ("sealed_blocks", "Blocks sealed", counters.sealed_blocks),
            ("fetched_blocks", "Blocks shown to readers", counters.fetched_blocks),
            ("corrupt_blocks", "Blocks dropped because a reader found them corrupt", counters.corrupt_blocks),
            ("evicted_blocks", "Blocks evicted to make room", self._store.num_evictions),
            ("pulled_bytes", "Bytes received from other agents", counters.pulled_bytes),
            ("pull_seconds", "Time spent receiving them", counters.pull_seconds),
        ):
            yield CounterMetricFamily(f"relevo_kv_{name}", text, value=value)
        missing = CounterMetricFamily("relevo_kv_missing_blocks", "Blocks that readers did not get", labels=["code"])
        for code, count in list(counters.missing_blocks.items()):
            missing.add_metric([code], count)
        yield missing

"""The agent's figures for Prometheus, read from the store and the tiers when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.kvtransfer.inspection import tier_states
from services.kvtransfer.store import Store
from services.kvtransfer.tiers import Tier


class StoreCollector(Collector):
    def __init__(self, store: Store, tiers: Sequence[Tier] = ()) -> None:
        self._store = store
        self._tiers = tiers

    def collect(self) -> Iterator[Metric]:
        audit = self._store.table.audit()
        slots = GaugeMetricFamily(
            "relevo_kv_slots",
            "Slots of the arena: `free`, `granted` (being written), `cached` (sealed, nobody "
            "reads it), `pinned` (sealed, being read)",
            labels=["state"],
        )
        for state, count in (
            ("free", audit.num_free),
            ("granted", audit.num_granted),
            ("cached", audit.num_sealed - audit.num_pinned),
            ("pinned", audit.num_pinned),
        ):
            slots.add_metric([state], count)
        yield slots
        yield GaugeMetricFamily("relevo_kv_leases", "Open streams of writers, pulls included", value=audit.num_leases)
        yield GaugeMetricFamily("relevo_kv_fetches", "Open streams of readers", value=audit.num_readers)
        counters = self._store.counters
        for name, text, value in (
            ("sealed_blocks", "Blocks sealed, by workers and by pulls", counters.sealed_blocks),
            ("fetched_blocks", "Blocks shown to readers", counters.fetched_blocks),
        ):
            yield CounterMetricFamily(f"relevo_kv_{name}", text, value=value)
        yield _by_label(
            "relevo_kv_expired",
            "Streams that were cut off: writers silent for their lease (lease), readers that kept their pins (pin)",
            "what",
            {"lease": counters.leases_expired, "pin": counters.pins_expired},
        )
        missing = dict(counters.missing_blocks)
        yield _by_label(
            "relevo_kv_missing_blocks", "Blocks that readers asked for and did not get, by gRPC code", "code", missing
        )
        yield from self._collect_tiers()

    def _collect_tiers(self) -> Iterator[Metric]:
        states = tier_states(self._store, self._tiers)
        for name, text, field in (
            ("blocks", "Blocks held", "num_blocks"),
            ("bytes", "Bytes held", "num_bytes"),
            ("max_bytes", "Bound on the bytes held", "max_bytes"),
        ):
            gauge = GaugeMetricFamily(f"relevo_kv_tier_{name}", text, labels=["tier"])
            for state in states:
                gauge.add_metric([state.tier], getattr(state, field))
            yield gauge
        for name, text, field in (
            ("hits", "Blocks found there when they were announced or asked for", "num_hits"),
            ("stored_blocks", "Blocks put there", "num_stored"),
            ("evicted_blocks", "Blocks removed to make room", "num_evicted"),
            ("checksum_failures", "Blocks dropped because their bytes were not what was sealed", "num_damaged"),
        ):
            counts = {state.tier: getattr(state, field) for state in states}
            yield _by_label(f"relevo_kv_tier_{name}", text, "tier", counts)
        dropped = CounterMetricFamily(
            "relevo_kv_tier_writes_dropped", "Blocks not written behind, by reason", labels=["tier", "reason"]
        )
        stopped = GaugeMetricFamily("relevo_kv_tier_stopped", "1: out of use for a while", labels=["tier"])
        for state in states:
            for reason, count in state.num_dropped.items():
                dropped.add_metric([state.tier, reason], count)
            stopped.add_metric([state.tier], bool(state.trouble))
        yield dropped
        yield stopped


def _by_label(name: str, text: str, label: str, counts: dict[str, int]) -> CounterMetricFamily:
    metric = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        metric.add_metric([value], count)
    return metric

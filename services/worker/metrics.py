"""A worker's figures for Prometheus, read off its latest load when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.worker.worker import Worker


class WorkerCollector(Collector):
    """Called in the metrics server's thread: reads single values, each of which the loop replaces as a whole."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        load = self._worker.load
        for name, text, value in (
            ("requests_running", "Requests that have KV blocks", load.num_running),
            ("requests_waiting", "Requests that have none yet", load.num_waiting),
            ("waiting_tokens", "Tokens known and not computed, of all requests", load.num_waiting_tokens),
            ("free_blocks", "KV blocks that are free or evictable", load.num_free_blocks),
            ("named_blocks", "KV blocks that can be found by name", len(self._worker.block_events)),
            (
                "prefill_tokens_per_second",
                "Mean over recent steps that computed prompts",
                load.prefill_tokens_per_second,
            ),
            ("step_seconds", "Mean duration of recent steps", load.step_seconds),
            ("step_age_seconds", "How long the step in progress takes already", self._worker.thread.step_ages()[0]),
            ("draining", "1: shutting down, and refusing new requests", int(load.draining)),
        ):
            yield GaugeMetricFamily(f"relevo_worker_{name}", text, value=value)
        yield CounterMetricFamily(
            "relevo_worker_requests", "Requests taken on since the start", value=self._worker.num_registered
        )
        for metric in self._worker.transfers.metrics:
            yield from metric.collect()

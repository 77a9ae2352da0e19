"""A worker's figures for Prometheus, read off its latest load when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from relevo.engine.spec_decode.stats import SpecDecodeStats
from services.worker.worker import Worker


class WorkerCollector(Collector):
    """Called in the metrics server's thread: reads single values, each of which the loop replaces as a whole."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        load = self._worker.load
        num_blocks = self._worker.engine.info.num_blocks
        for name, text, value in (
            ("num_requests_running", "Requests that have KV blocks", load.num_running),
            ("num_requests_waiting", "Requests that have none yet", load.num_waiting),
            (
                "kv_cache_usage_ratio",
                "Share of the KV blocks that requests hold",
                1 - load.num_free_blocks / num_blocks,
            ),
        ):
            yield GaugeMetricFamily(f"relevo_{name}", text, value=value)
        for name, text, count in (
            (
                "queries",
                "Tokens of prompts that were looked up in the KV cache, of requests that have ended",
                self._worker.num_prompt_tokens,
            ),
            (
                "hits",
                "Those of them that were not computed: found in the pool, or fetched",
                self._worker.num_cached_tokens,
            ),
        ):
            yield CounterMetricFamily(f"relevo_prefix_cache_{name}", text, value=count)
        for name, text, value in (
            ("waiting_tokens", "Tokens known and not computed, of all requests", load.num_waiting_tokens),
            ("free_blocks", "KV blocks that are free or evictable", load.num_free_blocks),
            ("named_blocks", "KV blocks that can be found by name", len(self._worker.block_events)),
            (
                "prefill_tokens_per_second",
                "Mean over recent steps that computed prompts",
                load.prefill_tokens_per_second,
            ),
            ("step_seconds", "Mean duration of recent steps, for each token that a request got", load.step_seconds),
            (
                "step_age_seconds",
                "How long the step in progress takes already: an engine that hangs shows here",
                self._worker.thread.step_ages()[0],
            ),
            ("draining", "1: shutting down, and refusing new requests", int(load.draining)),
        ):
            yield GaugeMetricFamily(f"relevo_worker_{name}", text, value=value)
        yield CounterMetricFamily(
            "relevo_worker_requests", "Requests taken on since the start", value=self._worker.num_registered
        )
        yield from _speculation(self._worker.speculation)
        for metric in self._worker.transfers.metrics:
            yield from metric.collect()


def _speculation(stats: SpecDecodeStats) -> Iterator[Metric]:
    for name, text, value in (
        ("drafts", "Of requests, in how many steps they had drafts", stats.num_drafts),
        ("draft_tokens", "Tokens that were drafted", stats.num_draft_tokens),
        ("accepted_tokens", "Of those, tokens that were accepted", stats.num_accepted_tokens),
        ("propose_seconds", "Time in the proposer", stats.propose_seconds),
        ("verify_seconds", "Time in passes that verified drafts, all of their rows included", stats.verify_seconds),
    ):
        yield CounterMetricFamily(f"relevo_spec_decode_{name}", text, value=value)
    positions = CounterMetricFamily(
        "relevo_spec_decode_accepted_tokens_per_pos",
        "The same, by position behind the known tokens",
        labels=["position"],
    )
    for position, value in enumerate(stats.num_accepted_tokens_per_pos):
        positions.add_metric([str(position)], value)
    yield positions
    yield GaugeMetricFamily(
        "relevo_spec_decode_acceptance_length",
        "Mean of the tokens that recent drafts brought in a step, one behind them included",
        value=stats.acceptance_length,
    )

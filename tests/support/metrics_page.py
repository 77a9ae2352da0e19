"""docs/metrics.md, made of what the processes export.

    python -m tests.support.metrics_page > docs/metrics.md

Names, types, labels and meanings are the code's; what is said around the tables is here.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from services.common.discovery import StaticDiscovery
from services.common.loop_lag import LoopLag
from services.router.admission import AdmissionMetrics
from services.router.fleet import Fleet
from services.router.fleet_metrics import FleetCollector
from services.router.http.connection import ConnectionMetrics
from services.router.http.metrics import EdgeMetrics
from services.router.route_log import Predictions
from services.router.tracing import Tracer, TracingConfig
from services.worker.metrics import WorkerCollector
from tests.support.agents import running_agent
from tests.workers.harness import running_local_decode

_HEAD = """# Metrics

Made by `python -m tests.support.metrics_page`, out of the code; a test holds the two together.

Prometheus text over HTTP. The router has them on its HTTP port under `/metrics`; agents and workers where
`--metrics-port` says (on `--host`; without a token, so keep that port to yourselves). Each process adds Python's and
the operating system's usual `python_*` and `process_*`.

Rates are left to the reader: bytes a second over a transport are `rate(relevo_kv_transfer_bytes_total[1m]) /
rate(relevo_kv_transfer_seconds_total[1m])`, and a 99th percentile is `histogram_quantile(0.99,
rate(relevo_kv_transfer_block_seconds_bucket[5m]))`.
"""
_AGENT = """
`direction`: `in` is what this agent pulls from others, `out` what others pull from it. `transport`: `tcp` or `nixl`.
NIXL reads from a source's memory without asking it, so a source has no figures of transfers `out` over `nixl`; the
other end has them, `in`.
"""
_WORKERS = """
Prefill and decode have the same. `direction`: `in` is out of the arena into the worker's pool, `out` a prompt's
blocks for the worker that goes on with it, `offer` a worker's own blocks, for whoever finds them, `direct` out of
another worker's pool into this one's (`--direct-kv`). `reason`: `changed` is that something else was there by then,
`failed` that the read did not end well or in time, `apart` that the two were not connected.
"""


class _NoQueue:
    """Where a tracer without an exporter puts its spans: nowhere."""


async def metrics_page() -> str:
    """The whole page."""
    agent = table(await _agent())
    async with running_local_decode() as running:
        registry = CollectorRegistry()
        registry.register(WorkerCollector(running.worker))
        registry.register(LoopLag().metric)
        workers = table(registry)
    return f"{_HEAD}\n## Agent\n{_AGENT}\n{agent}\n## Workers\n{_WORKERS}\n{workers}\n## Router\n\n{table(_router())}"


def table(registry: CollectorRegistry) -> str:
    rows = ["| name | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in registry.collect():
        if metric.name.startswith("relevo_"):
            name = f"{metric.name}_total" if metric.type == "counter" else metric.name
            labels = ", ".join(_labels(registry, metric))
            rows.append(f"| `{name}` | {metric.type} | {labels} | {metric.documentation.rstrip('.')} |")
    return "\n".join(rows) + "\n"


def _labels(registry: CollectorRegistry, metric: Metric) -> Iterable[str]:
    """Also of those that have no values yet."""
    collector: Any = registry._names_to_collectors.get(metric.name)
    of_values = dict.fromkeys(label for sample in metric.samples for label in sample.labels if label != "le")
    return getattr(metric, "_labelnames", None) or getattr(collector, "_labelnames", None) or of_values


async def _agent() -> CollectorRegistry:
    found: list[CollectorRegistry] = []

    def keep(registry: CollectorRegistry, *_: object) -> tuple[int, Any]:
        found.append(registry)
        return 0, lambda: None

    with (
        tempfile.TemporaryDirectory(prefix="relevo-metrics-") as folder,
        patch("services.kvtransfer.agent.serve_metrics", keep),
    ):
        async with running_agent(Path(folder), metrics_port=0, transports=["tcp"]):
            [registry] = found
            families = list(registry.collect())
    kept = CollectorRegistry()
    kept.register(_Kept(families))
    return kept


class _Kept:
    """What an agent that has ended had to show."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _router() -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(FleetCollector(Fleet(StaticDiscovery({})), asyncio.get_running_loop()))
    EdgeMetrics(registry)
    ConnectionMetrics(registry)
    AdmissionMetrics(registry)
    Predictions(registry)
    Tracer(TracingConfig(), _NoQueue(), registry)  # type: ignore[arg-type]
    registry.register(LoopLag().metric)
    return registry


if __name__ == "__main__":
    print(asyncio.run(metrics_page()), end="")

"""The fleet's figures for Prometheus, read off when they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.router.fleet import Fleet


class FleetCollector(Collector):
    """May be called in the metrics server's thread: reads single values, and lists that nobody changes."""

    def __init__(self, fleet: Fleet, loop: asyncio.AbstractEventLoop) -> None:
        """loop: that the fleet runs in, for its clock"""
        self._fleet = fleet
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        now = self._loop.time()
        workers = GaugeMetricFamily(
            "relevo_fleet_workers",
            "1 for each worker that is known, with its condition: ready, lost, leaving, draining, stuck or tripped",
            labels=("role", "address", "condition"),
        )
        for worker in self._fleet.workers:
            workers.add_metric((worker.kind.name, worker.address, worker.condition(now)), 1)
        yield workers
        yield GaugeMetricFamily(
            "relevo_fleet_discovery_stopped",
            "1: discovery does not work, and serving goes on with the workers that are known",
            value=int(bool(self._fleet.trouble)),
        )

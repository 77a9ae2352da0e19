"""docs/metrics.md names every figure that a process exports, with its type, and no other."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from urllib.request import urlopen

from prometheus_client import CollectorRegistry

from services.common.discovery import StaticDiscovery
from services.common.loop_lag import LoopLag
from services.common.telemetry import render_metrics
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

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def documented(heading: str) -> dict[str, str]:
    """Name → type, of the table below a heading."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(relevo_\w+)`.*?\| (\w+) \|", section, re.M)
    assert len({name for name, _ in rows}) == len(rows), "a name stands there twice"
    return dict(rows)


def exported(text: bytes) -> dict[str, str]:
    """Name → type, of our own figures. Not `…_created`, which the library adds to each counter and histogram."""
    found = re.findall(r"^# TYPE (relevo_\w+) (\w+)$", text.decode(), re.M)
    return {name: kind for name, kind in found if not name.endswith("_created")}


async def test_agents_figures(tmp_path: Path) -> None:
    async with running_agent(tmp_path, metrics_port=0, transports=["tcp"]) as agent:
        with await asyncio.to_thread(urlopen, f"http://127.0.0.1:{agent.metrics_port}/metrics") as reply:
            assert exported(reply.read()) == documented("Agent")


async def test_workers_figures() -> None:
    async with running_local_decode() as running:
        registry = CollectorRegistry()
        registry.register(WorkerCollector(running.worker))
        registry.register(LoopLag().metric)
        assert exported(render_metrics(registry)[0]) == documented("Workers")


class NoQueue:
    pass


async def test_routers_figures() -> None:
    registry = CollectorRegistry()
    registry.register(FleetCollector(Fleet(StaticDiscovery({})), asyncio.get_running_loop()))
    EdgeMetrics(registry)
    ConnectionMetrics(registry)
    AdmissionMetrics(registry)
    Predictions(registry)
    Tracer(TracingConfig(), NoQueue(), registry)  # type: ignore[arg-type]
    registry.register(LoopLag().metric)
    assert exported(render_metrics(registry)[0]) == documented("Router")

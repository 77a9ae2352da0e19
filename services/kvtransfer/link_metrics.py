"""Figures of the links to and from other agents, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.kvtransfer.links import Links
from services.kvtransfer.transports.tcp_server import TcpDataServer


class LinkCollector(Collector):
    def __init__(self, links: Links, data_server: TcpDataServer) -> None:
        self._links = links
        self._data_server = data_server

    def collect(self) -> Iterator[Metric]:
        labels = ["peer", "transport"]
        rate = GaugeMetricFamily("relevo_kv_link_bytes_per_second", "Measured when it was opened", labels=labels)
        latency = GaugeMetricFamily("relevo_kv_link_latency_seconds", "Measured when it was opened", labels=labels)
        connections = GaugeMetricFamily("relevo_kv_link_connections", "Data connections of a link", labels=labels)
        for link in self._links.open_links:
            of = [link.address, link.puller.name]
            rate.add_metric(of, link.figures.bytes_per_second)
            latency.add_metric(of, link.figures.latency_seconds)
            connections.add_metric(of, link.figures.num_connections)
        yield from (rate, latency, connections)
        yield from self._transfers()
        counters = self._links.counters
        failed = CounterMetricFamily(
            "relevo_kv_transfer_failed_blocks", "Blocks that were to be pulled and were not", labels=["reason"]
        )
        for reason, count in list(counters.failed_blocks.items()):
            failed.add_metric([reason], count)
        yield failed
        for name, text, value in (
            ("links_opened", "Links to other agents", counters.num_opened),
            ("links_broken", "Links that ended while they were in use", counters.num_broken),
            ("data_port_refused", "Connections that sent no right hello", self._data_server.num_refused),
            ("data_port_broken", "Connections that ended in the middle", self._data_server.num_broken),
        ):
            yield CounterMetricFamily(f"relevo_kv_{name}", text, value=value)

    def _transfers(self) -> Iterator[Metric]:
        """Direction in: pulled from others. Out: what others pulled over our data port."""
        counters, labels = self._links.counters, ["direction", "transport"]
        num_bytes = CounterMetricFamily("relevo_kv_transfer_bytes", "Bytes of blocks", labels=labels)
        blocks = CounterMetricFamily("relevo_kv_transfer_blocks", "Blocks", labels=labels)
        seconds = CounterMetricFamily("relevo_kv_transfer_seconds", "Time that pulls took", labels=labels)
        for family, values in (
            (num_bytes, counters.bytes),
            (blocks, counters.blocks),
            (seconds, counters.seconds),
        ):
            for transport, value in list(values.items()):
                family.add_metric(["in", transport], value)
        num_bytes.add_metric(["out", "tcp"], self._data_server.num_bytes)
        blocks.add_metric(["out", "tcp"], self._data_server.num_blocks)
        yield from (num_bytes, blocks, seconds)

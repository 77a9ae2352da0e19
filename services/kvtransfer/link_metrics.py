"""Figures of the links to and from other agents, for Prometheus.

Direction in: what we pull from others. Out: what others pull from us.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.kvtransfer.link_servicer import KvLinkServicer
from services.kvtransfer.links import Links
from services.kvtransfer.transports import Figures
from services.kvtransfer.transports.tcp_server import TcpDataServer

_MAX_REASON_CHARS = 500  # it comes from the other end


class LinkCollector(Collector):
    """Called in the metrics server's thread: copies what the event loop changes."""

    def __init__(self, links: Links, servicer: KvLinkServicer, data_server: TcpDataServer) -> None:
        self._links = links
        self._servicer = servicer
        self._data_server = data_server

    def collect(self) -> Iterator[Metric]:
        yield from self._open_links()
        yield from self._probes()
        yield from self._transfers()
        counters = self._links.counters
        failed = CounterMetricFamily(
            "relevo_kv_transfer_failed_blocks", "Blocks that were to be pulled and were not", labels=["reason"]
        )
        for reason, count in counters.failed_blocks.copy().items():
            failed.add_metric([reason], count)
        yield failed
        for name, text, value in (
            ("links_opened", "Links to other agents", counters.num_opened),
            ("links_broken", "Links that ended while they were in use", counters.num_broken),
            ("data_port_refused", "Connections that sent no right hello", self._data_server.num_refused),
            ("data_port_broken", "Connections that ended in the middle", self._data_server.num_broken),
        ):
            yield CounterMetricFamily(f"relevo_kv_{name}", text, value=value)

    def _open_links(self) -> Iterator[Metric]:
        """What was chosen, with what was measured of it when the link was opened, and why."""
        labels = ["direction", "peer", "transport"]
        rate = GaugeMetricFamily("relevo_kv_link_bytes_per_second", "Measured when it was opened", labels=labels)
        latency = GaugeMetricFamily("relevo_kv_link_latency_seconds", "Measured when it was opened", labels=labels)
        connections = GaugeMetricFamily("relevo_kv_link_connections", "Data connections of a link", labels=labels)
        info = GaugeMetricFamily(
            "relevo_kv_link_info",
            "1; `reason` says why this transport, with what was measured of each",
            labels=[*labels, "reason"],
        )
        for each in self._all_open():
            of = [each.direction, each.peer, each.transport]
            rate.add_metric(of, each.figures.bytes_per_second)
            latency.add_metric(of, each.figures.latency_seconds)
            connections.add_metric(of, each.figures.num_connections)
            info.add_metric([*of, each.reason[:_MAX_REASON_CHARS]], 1)
        yield from (rate, latency, connections, info)
        yield GaugeMetricFamily(
            "relevo_kv_link_floor_bytes_per_second",
            "`--link-floor`: a link that is slower is a WARNING",
            value=self._links.floor,
        )

    def _all_open(self) -> list[_OpenLink]:
        """One for each direction, peer and transport: a peer that was started again may have an old link, too."""
        pulled = [
            _OpenLink("in", link.address, link.puller.name, link.figures, link.reason)
            for link in self._links.open_links
        ]
        served = [
            _OpenLink(
                "out",
                peer,
                chosen.transport,
                Figures(chosen.bytes_per_second, chosen.latency_seconds, chosen.num_connections),
                chosen.reason,
            )
            for peer, chosen in self._servicer.chosen.copy().values()
        ]
        return list({(each.direction, each.peer, each.transport): each for each in [*pulled, *served]}.values())

    def _probes(self) -> Iterator[Metric]:
        """Of all transports that answered, and not of the chosen one alone."""
        labels = ["peer", "transport"]
        rate = GaugeMetricFamily("relevo_kv_probe_bytes_per_second", "Measured when the link was opened", labels=labels)
        latency = GaugeMetricFamily("relevo_kv_probe_latency_seconds", "Measured when it was opened", labels=labels)
        for link in self._links.open_links:
            for transport, figures in link.probes.items():
                rate.add_metric([link.address, transport], figures.bytes_per_second)
                latency.add_metric([link.address, transport], figures.latency_seconds)
        probes = CounterMetricFamily("relevo_kv_probes", "Probes of transports", labels=["transport", "result"])
        for (transport, result), count in self._links.counters.probes.copy().items():
            probes.add_metric([transport, result], count)
        yield from (rate, latency, probes)

    def _transfers(self) -> Iterator[Metric]:
        """bytes / seconds is what a pull gets, or what a connection is served with; several go on at the same time."""
        counters, labels = self._links.counters, ["direction", "transport"]
        num_bytes = CounterMetricFamily("relevo_kv_transfer_bytes", "Bytes of blocks", labels=labels)
        blocks = CounterMetricFamily("relevo_kv_transfer_blocks", "Blocks", labels=labels)
        seconds = CounterMetricFamily(
            "relevo_kv_transfer_seconds", "Time that receiving or sending them took, added up", labels=labels
        )
        for family, values, served in (
            (num_bytes, counters.bytes, self._data_server.num_bytes),
            (blocks, counters.blocks, self._data_server.num_blocks),
            (seconds, counters.seconds, self._data_server.seconds),
        ):
            for transport, value in values.copy().items():
                family.add_metric(["in", transport], value)
            family.add_metric(["out", "tcp"], served)
            yield family
        yield from counters.times.batches.collect()
        yield from counters.times.blocks.collect()


@dataclass(frozen=True)
class _OpenLink:
    direction: str
    peer: str
    transport: str
    figures: Figures
    reason: str

"""What is counted of the links to other agents, by transport, since the start."""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client import Histogram

# From shared memory within a host to a link that nearly stands still.
_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LABELS = ("direction", "transport")


class TransferTimes:
    """How long transfers took, in both directions. Observed from any thread; has no registry of its own.

    direction "in": what we pull. "out": what others pull from us, where we see it (tcp; NIXL reads without asking us).
    """

    def __init__(self) -> None:
        self.batches = Histogram(
            "relevo_kv_transfer_batch_seconds",
            "Time to receive the blocks that a source showed at once",
            _LABELS,
            buckets=_BUCKETS,
            registry=None,
        )
        self.blocks = Histogram(
            "relevo_kv_transfer_block_seconds",
            "In: from the source's message that shows a block to its being sealed here. Out: from the request until the"
            " last byte was given to the network",
            _LABELS,
            buckets=_BUCKETS,
            registry=None,
        )
        for direction in ("in", "out"):  # shown from the start; other transports where they are used
            self.batches.labels(direction, "tcp")
            self.blocks.labels(direction, "tcp")

    def observe_batch(self, direction: str, transport: str, seconds: float) -> None:
        self.batches.labels(direction, transport).observe(seconds)

    def observe_block(self, direction: str, transport: str, seconds: float) -> None:
        self.blocks.labels(direction, transport).observe(seconds)


@dataclass
class LinkCounters:
    """Of all links together, pulling end. Changed in the event loop."""

    bytes: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed_blocks: dict[str, int] = field(default_factory=dict)  # by reason: not_pinned, corrupt, broken
    probes: dict[tuple[str, str], int] = field(default_factory=dict)  # by transport and result: measured, failed
    num_opened: int = 0
    num_broken: int = 0
    times: TransferTimes = field(default_factory=TransferTimes)

    def count_block(self, transport: str, num_bytes: int, seconds: float) -> None:
        """seconds: since the source has shown it."""
        self.bytes[transport] = self.bytes.get(transport, 0) + num_bytes
        self.blocks[transport] = self.blocks.get(transport, 0) + 1
        self.times.observe_block("in", transport, seconds)

    def count_batch(self, transport: str, seconds: float) -> None:
        self.seconds[transport] = self.seconds.get(transport, 0.0) + seconds
        self.times.observe_batch("in", transport, seconds)

    def count_failed(self, reason: str, num_blocks: int) -> None:
        self.failed_blocks[reason] = self.failed_blocks.get(reason, 0) + num_blocks

    def count_probe(self, transport: str, result: str) -> None:
        self.probes[transport, result] = self.probes.get((transport, result), 0) + 1

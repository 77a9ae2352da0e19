"""How a block's bytes get from one agent's arena into another's. Control is gRPC; this is the data plane.

The serving end offers what it has (`DataServer.offer`); the pulling end opens a `Puller` for each offer that it
understands, probes them, and keeps the one that is quickest (links.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from services.pb import kvlink_pb2


class PinnedSlots(Protocol):
    """What a serving end must ask before it shows a byte. Called from any thread."""

    def has_pinned_slot(self, token: bytes, slot: int) -> bool: ...


class DataServer(Protocol):
    """The end whose arena holds the blocks. Methods are called in the event loop, and do not block."""

    def offer(self) -> kvlink_pb2.TransportOffer | None:
        """For a peer that has just opened a link; None: not now."""
        ...

    def admit(self, link_id: bytes, secret: bytes) -> None:
        """Serve those who prove to know the secret."""
        ...

    def end_link(self, link_id: bytes) -> None:
        """Cut off what was served to it. Ending twice is harmless."""
        ...


class Outcome(Enum):
    ARRIVED = "arrived"  # in place, and its checksum is right
    NOT_PINNED = "not_pinned"  # the source does not hold it for us (any more)
    CORRUPT = "corrupt"  # what came is not what its writer sealed


@dataclass(frozen=True, slots=True)
class WantedBlock:
    """slot: at the source. into: block_bytes of ours. checksum: xxh3-64 of what must come."""

    slot: int
    into: memoryview
    checksum: int


@dataclass(frozen=True)
class Figures:
    """What a probe measured."""

    bytes_per_second: float
    latency_seconds: float  # of a request for nothing and its answer
    num_connections: int = 1

    def seconds_for(self, num_bytes: int) -> float:
        return self.latency_seconds + num_bytes / self.bytes_per_second


class Puller(Protocol):
    """The end that pulls, for one link. Any number of pulls at the same time, in one event loop."""

    name: str

    async def probe(self) -> Figures:
        """Measure, and keep as many connections as help. Raises Unavailable."""
        ...

    async def pull(self, token: bytes, blocks: Sequence[WantedBlock], answered: Callable[[int, Outcome], None]) -> None:
        """Fetch blocks that the stream of this token has pinned; answered: called with the index of each, in any order.

        Raises Unavailable if the link broke: then some are not answered. When this returns, raises or is cancelled,
        nobody writes into the blocks any more. It is bounded: a source that sends nothing for STALL_SECONDS is broken.
        """
        ...

    async def close(self) -> None:
        """End all pulls, and threads. Closing twice is harmless."""
        ...


STALL_SECONDS = 5.0  # no byte for this long in the middle of a transfer: the peer has died, stopped or been cut off

"""What a worker measures of the blocks that it takes in and gives out."""

from __future__ import annotations

import threading
from enum import Enum

from prometheus_client import Counter, Histogram

_RATE_WEIGHT = 0.1  # of the newest copy in the mean
_TAIL_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_RATIO_BUCKETS = (0.125, 0.25, 0.5, 0.75, 0.875, 0.9375, 0.97, 0.999, 1)


class Direction(Enum):
    IN = "in"  # out of the arena into the pool
    DIRECT = "direct"  # out of another worker's pool into ours
    OUT = "out"  # a prompt's, for the worker that goes on with it
    OFFER = "offer"  # our own, for whoever finds them there


class Fallback(Enum):
    """Why a block did not come directly."""

    CHANGED = "changed"  # what was read is not the block: its writer has used the place for another
    FAILED = "failed"  # the read did not end well, or in time
    APART = "apart"  # there is no connection: not yet, or not for a while


class Transfers:
    """Counted from any thread. metrics: for a registry."""

    def __init__(self) -> None:
        self._blocks = Counter("relevo_handover_blocks", "KV blocks copied, by direction", ["direction"], registry=None)
        self._bytes = Counter("relevo_handover_bytes", "Bytes of KV copied, by direction", ["direction"], registry=None)
        self._seconds = Counter(
            "relevo_handover_copy_seconds", "Time that copies took, by direction", ["direction"], registry=None
        )
        self._fallbacks = Counter(
            "relevo_handover_direct_fallbacks",
            "KV blocks that were to come out of another worker's pool, and were copied out of the arena, by reason",
            ["reason"],
            registry=None,
        )
        self._tail = Histogram(
            "relevo_handover_tail_seconds",
            "From a split request's first token to the last of its blocks in decode's pool",
            buckets=_TAIL_BUCKETS,
            registry=None,
        )
        self._overlap = Histogram(
            "relevo_handover_overlap_ratio",
            "Share of a split request's blocks that was in decode's pool when its first token came",
            buckets=_RATIO_BUCKETS,
            registry=None,
        )
        for each in (self._blocks, self._bytes, self._seconds):
            for direction in Direction:
                each.labels(direction.value)  # shown from the start
        for reason in Fallback:
            self._fallbacks.labels(reason.value)
        self.metrics = (self._blocks, self._bytes, self._seconds, self._fallbacks, self._tail, self._overlap)
        self._lock = threading.Lock()
        self._copy_bytes_per_second = 0.0
        self._link_bytes_per_second = 0.0

    @property
    def bytes_per_second(self) -> float:
        """How fast blocks come in: over the link to another agent, if one was used, and the copy. 0: not measured."""
        copy, link = self._copy_bytes_per_second, self._link_bytes_per_second
        return 1 / (1 / copy + 1 / link) if copy and link else copy

    def fell_back(self, reason: Fallback, num_blocks: int) -> None:
        self._fallbacks.labels(reason.value).inc(num_blocks)

    def copied(self, direction: Direction, num_blocks: int, num_bytes: int, seconds: float) -> None:
        """num_bytes: of all of them"""
        self._blocks.labels(direction.value).inc(num_blocks)
        self._bytes.labels(direction.value).inc(num_bytes)
        self._seconds.labels(direction.value).inc(seconds)
        if direction in (Direction.IN, Direction.DIRECT) and num_bytes and seconds > 0:
            rate = num_bytes / seconds
            with self._lock:
                mean = self._copy_bytes_per_second
                self._copy_bytes_per_second = mean + _RATE_WEIGHT * (rate - mean) if mean else rate

    def came_over_link(self, bytes_per_second: float) -> None:
        """What the agent measured on the link that blocks come over; 0: they lie on this host."""
        self._link_bytes_per_second = bytes_per_second

    def handed_over(self, num_blocks: int, num_before_first_token: int, tail_seconds: float) -> None:
        """A split request has its blocks."""
        if num_blocks:
            self._overlap.observe(num_before_first_token / num_blocks)
            self._tail.observe(tail_seconds)

"""Follows the block events of a worker, or of an agent, into the prefix index."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc.aio

from relevo.core.errors import RelevoError
from relevo.core.prefix_index import PrefixIndex, split_names
from services.common.errors import relevo_errors
from services.common.grpc import cancelling
from services.pb import messages_pb2, worker_pb2

BlocksCall = grpc.aio.UnaryStreamCall[worker_pb2.WatchBlocksRequest, worker_pb2.BlockEvents]


class EventGap(RelevoError):
    """Events were lost, or make no sense: what is known of the worker's blocks may be wrong. Watch again."""

    grpc_code = "ABORTED"


class BlockWatch:
    """The events of one WatchBlocks call: a snapshot in parts, then deltas numbered without gaps.

    Deltas count one up from the snapshot's number; messages with the load alone repeat the last number.
    """

    def __init__(self, index: PrefixIndex, worker: str) -> None:
        self._index = index
        self._worker = worker
        self._sequence: int | None = None  # of the last event; None before the snapshot
        self.is_complete = False  # the snapshot is all there

    def apply(self, event: worker_pb2.BlockEvents) -> None:
        """Raises EventGap if an event before this one is missing."""
        kind = event.WhichOneof("events")
        try:
            if kind == "snapshot":
                self._apply_snapshot(event)
                return
            expected = None if self._sequence is None else self._sequence + (kind == "delta")
            if event.sequence != expected or not self.is_complete:
                raise EventGap(f"{self._worker}: event {event.sequence} came where {expected} was due")
            self._sequence = expected
            if kind == "delta":
                self._index.remove(self._worker, split_names(event.delta.removed))
                self._index.store(self._worker, split_names(event.delta.stored))
        except ValueError as error:
            raise EventGap(f"{self._worker}: {error}") from error

    def _apply_snapshot(self, event: worker_pb2.BlockEvents) -> None:
        snapshot = event.snapshot
        if snapshot.first:
            self._index.forget(self._worker)
        elif self._sequence is None or self.is_complete:
            raise EventGap(f"{self._worker}: a snapshot's part came without its first")
        self._index.store(self._worker, split_names(snapshot.block_hashes))
        self._sequence = event.sequence
        self.is_complete = snapshot.last


async def follow_blocks(
    watching: BlocksCall,
    watch: BlockWatch,
    peer: str,
    silence_seconds: float,
    on_load: Callable[[messages_pb2.Load], None] | None = None,
) -> None:
    """One WatchBlocks call, to its end. Raises TimeoutError on silence, EventGap, or what ended the call."""
    with relevo_errors(peer), cancelling(watching) as call:
        while True:
            async with asyncio.timeout(silence_seconds):
                event = await call.read()
            if not isinstance(event, worker_pb2.BlockEvents):
                return  # EOF
            if on_load is not None and event.HasField("load"):
                on_load(event.load)
            watch.apply(event)


def is_our_own_cancellation() -> bool:
    """gRPC raises CancelledError also where it was the peer who ended the call with CANCELLED: is it for this task?"""
    task = asyncio.current_task()
    return task is None or bool(task.cancelling())

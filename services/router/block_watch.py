"""Follows one worker's block events into the prefix index."""

from __future__ import annotations

from relevo.core.errors import RelevoError
from relevo.core.prefix_index import PrefixIndex, split_names
from services.pb import worker_pb2


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

"""Blocks between a GPU and the host, on streams of their own: while steps compute, and ordered with them by events.

leaving   waits for the last step whose results are known: what is held and named was written by it, or before
arriving  waits for the last step that was launched: a place that was reserved may still be written in it, for a request
          that has ended while it was in flight

Both have happened when their context has ended. So whoever is told that blocks have left may free them, and a step that
reads blocks which have arrived is launched after they have: it has nothing to wait for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from queue import SimpleQueue
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

STAGED_BLOCKS = 16  # at most, in one call
_NUM_LANES = 2  # copies at the same time: one is checked by the host while the other one is on its way


class BlockStreams:
    """Each block is one copy between the cache and pinned memory, which nobody else can write to (ADR 26).

    storage: [num_blocks, block_bytes] uint8, on the GPU
    cuda: torch.cuda, or what stands in for it

    leaving and arriving are for any thread; those that find no lane free wait. The others are the engine's thread's.
    Errors of CUDA are RuntimeErrors; nothing touches the blocks any more when they are raised.
    """

    def __init__(self, storage: Tensor, cuda: Any = torch.cuda) -> None:
        self._storage = storage
        self._cuda = cuda
        self._in_flight: deque[Any] = deque()  # events, behind each step that was launched and is not settled
        self._launched: Any = None
        self._settled: Any = None
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        for _ in range(_NUM_LANES):
            self._lanes.put(_Lane(storage, cuda))

    def step_launched(self) -> None:
        """All that a step does has been enqueued on the current stream."""
        self.written()
        self._in_flight.append(self._launched)

    def step_settled(self) -> None:
        """The results of the oldest step in flight are about to be told."""
        self._settled = self._in_flight.popleft()

    def written(self) -> None:
        """Blocks are written by what was enqueued on the current stream, beside a step."""
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self._storage.device))
        self._launched = event

    @contextmanager
    def leaving(self, block_ids: Sequence[int]) -> Iterator[list[NDArray[Any]]]:
        """See KVCache.leaving."""
        with self._lane() as lane:
            staged = lane.staging[: len(block_ids)]
            with lane.behind(self._settled):
                for row, block_id in enumerate(block_ids):
                    staged[row].copy_(self._storage[block_id], non_blocking=True)
            yield list(staged.numpy())

    @contextmanager
    def arriving(self, block_ids: Sequence[int]) -> Iterator[list[NDArray[Any]]]:
        """See KVCache.arriving."""
        with self._lane() as lane:
            staged = lane.staging[: len(block_ids)]
            yield list(staged.numpy())
            with lane.behind(self._launched):
                for row, block_id in enumerate(block_ids):
                    self._storage[block_id].copy_(staged[row], non_blocking=True)

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        lane = self._lanes.get()
        try:
            yield lane
        finally:
            self._lanes.put(lane)


class _Lane:
    """A stream, and memory that it can be copied to while the host does something else."""

    def __init__(self, storage: Tensor, cuda: Any) -> None:
        self._storage = storage
        self._cuda = cuda
        self._stream = cuda.Stream(storage.device)
        self._done = cuda.Event(blocking=True)  # who waits for it sleeps, and keeps neither a core nor the GIL

    @cached_property
    def staging(self) -> Tensor:
        """[STAGED_BLOCKS, block_bytes] uint8. Made when it is first needed: engines without a hand-over need none."""
        shape = (STAGED_BLOCKS, self._storage.shape[1])
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._storage.is_cuda)

    @contextmanager
    def behind(self, event: Any) -> Iterator[None]:
        """What is enqueued inside happens after the event; at the end, also one by an exception, it has happened."""
        with self._cuda.stream(self._stream):
            if event is not None:
                self._stream.wait_event(event)
            try:
                yield
            finally:
                self._done.record(self._stream)
                self._done.synchronize()

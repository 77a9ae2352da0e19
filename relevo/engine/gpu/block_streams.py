"""Blocks between a GPU and the host, on streams of their own: while steps compute, and ordered with them by events.

out  waits for the last step whose results are known: what is held and named was written by it, or before
in   waits for the last step that was launched when the place had been reserved: it may still be written in that one,
     for a request that has ended while it was in flight. Later steps are not waited for: they know whose it is

Both have happened when a call, or its context, has ended. So whoever is told that blocks have left may free them, and a
step that reads blocks which have arrived is launched after they have: it has nothing to wait for.

Each block is one copy. Between the cache and memory that others may write to, the agent's arena, checksums are those of
the cache's bytes, made on the device (ADR 26). Where that cannot be, blocks go by way of pinned memory of our own.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from queue import SimpleQueue
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from relevo.engine.gpu.pinned_memory import PinnedMemory
from relevo.kernels.xxh3 import finish

logger = logging.getLogger(__name__)

STAGED_BLOCKS = 16  # at most, in one call
_NUM_LANES = 2  # copies at the same time

HashLanes = Callable[[Tensor, Tensor], Tensor]


def hash_lanes(storage: Tensor, block_ids: Tensor) -> Tensor:
    """Triton's, which is loaded when it is first needed."""
    from relevo.kernels.triton.checksum import hash_lanes

    return hash_lanes(storage, block_ids)


def _check_hashing(storage: Tensor) -> None:
    """Raises if checksums of these blocks cannot be made on the device."""
    from relevo.kernels.triton import checksum

    if not checksum.can_hash(storage.shape[1]):
        raise ValueError(f"blocks of {storage.shape[1]} bytes have checksums of the host alone")
    if not checksum.check(storage.device):
        raise ValueError("checksums that are made on this device are wrong")


class BlockStreams:
    """storage: [num_blocks, block_bytes] uint8, on the GPU
    cuda, hashing: torch.cuda and what hashes on the device, or what stands in for them

    step_launched, step_settled and written are the engine's thread's; the others are for any. Errors of CUDA are
    RuntimeErrors; nothing touches the blocks any more when they are raised.
    """

    def __init__(self, storage: Tensor, cuda: Any = torch.cuda, hashing: HashLanes = hash_lanes) -> None:
        self._storage = storage
        self._cuda = cuda
        self._in_flight: deque[Any] = deque()  # events, behind each step that was launched and is not settled
        self._launched: Any = None
        self._settled: Any = None
        self._pinned: PinnedMemory | None = None
        self._pinning = threading.Lock()  # two that wait for all lanes would wait for each other
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        for _ in range(_NUM_LANES):
            self._lanes.put(_Lane(storage, cuda, hashing))

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

    @property
    def last_launch(self) -> Any:
        """An event, behind the last step that was launched and all before it; None if there was none."""
        return self._launched

    def pin(self, view: memoryview) -> None:
        """See KVCache.pin."""
        with self._pinning:
            pinned = None
            try:
                self.check_hashing()
                with self._cuda.device(self._storage.device):
                    pinned = PinnedMemory(view, self._cuda)
            except Exception as error:  # CUDA's, Triton's, its compiler's: there is another way
                logger.warning("KV blocks go by way of memory of our own, more slowly: %s", error)
            with ExitStack() as nobody_copies:
                for _ in range(_NUM_LANES):
                    nobody_copies.enter_context(self._lane())
                before, self._pinned = self._pinned, pinned
                if before is not None:
                    before.release()

    def send(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> list[int] | None:
        """See KVCache.send."""
        with self._lane() as lane:
            if not self._reaches(slots):
                return None
            targets = [torch.frombuffer(slot, dtype=torch.uint8) for slot in slots]
            with lane.behind(self._settled):
                for block_id, target in zip(block_ids, targets, strict=True):
                    target.copy_(self._storage[block_id], non_blocking=True)
                lane.hash(block_ids)
            return lane.checksums(len(block_ids))

    def receive(self, block_ids: Sequence[int], slots: Sequence[memoryview], after: Any) -> list[int] | None:
        """See KVCache.receive. after: an event, or None"""
        with self._lane() as lane:
            if not self._reaches(slots):
                return None
            sources = [torch.frombuffer(slot, dtype=torch.uint8) for slot in slots]
            with lane.behind(after):
                for block_id, source in zip(block_ids, sources, strict=True):
                    self._storage[block_id].copy_(source, non_blocking=True)
                lane.hash(block_ids)
            return lane.checksums(len(block_ids))

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
    def arriving(self, block_ids: Sequence[int], after: Any) -> Iterator[list[NDArray[Any]]]:
        """See KVCache.arriving."""
        with self._lane() as lane:
            staged = lane.staging[: len(block_ids)]
            yield list(staged.numpy())
            with lane.behind(after):
                for row, block_id in enumerate(block_ids):
                    self._storage[block_id].copy_(staged[row], non_blocking=True)

    def check_hashing(self) -> None:
        """Raises if checksums of these blocks cannot be made on the device."""
        with self._cuda.device(self._storage.device):
            _check_hashing(self._storage)

    def enter_thread(self) -> None:
        """See CacheMemory.enter_thread."""
        self._cuda.set_device(self._storage.device)

    def settle(self) -> None:
        """See CacheMemory.settle."""
        self._cuda.synchronize(self._storage.device)

    def wait_for(self, after: Any) -> None:
        """Until the event has happened: as `in`, for those who are on no stream."""
        with self._lane() as lane, lane.behind(after):
            pass

    def checksums(self, block_ids: Sequence[int]) -> list[int]:
        """Of blocks as they are in the cache."""
        with self._lane() as lane:
            with lane.behind(None):
                lane.hash(block_ids)
            return lane.checksums(len(block_ids))

    def _reaches(self, slots: Sequence[memoryview]) -> bool:
        pinned = self._pinned
        return pinned is not None and bool(slots) and all(pinned.holds(slot) for slot in slots)

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """Waits for one that is free."""
        lane = self._lanes.get()
        try:
            yield lane
        finally:
            self._lanes.put(lane)


class _Lane:
    """A stream, and what one call needs on the host while it is under way."""

    def __init__(self, storage: Tensor, cuda: Any, hashing: HashLanes) -> None:
        self._storage = storage
        self._cuda = cuda
        self._hashing = hashing
        self._stream = cuda.Stream(storage.device)
        self._done = cuda.Event(blocking=True)  # who waits for it sleeps, and keeps neither a core nor the GIL
        self._block_ids = self._make(STAGED_BLOCKS, dtype=torch.int64)
        self._hashed = self._make(STAGED_BLOCKS, 8, dtype=torch.int64)

    @cached_property
    def staging(self) -> Tensor:
        """[STAGED_BLOCKS, block_bytes] uint8. Made when it is first needed."""
        return self._make(STAGED_BLOCKS, self._storage.shape[1], dtype=torch.uint8)

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

    def hash(self, block_ids: Sequence[int]) -> None:
        """Enqueue it; inside `behind`."""
        num_blocks = len(block_ids)
        self._block_ids.numpy()[:num_blocks] = block_ids
        ids = self._block_ids[:num_blocks].to(self._storage.device, non_blocking=True)
        self._hashed[:num_blocks].copy_(self._hashing(self._storage, ids), non_blocking=True)

    def checksums(self, num_blocks: int) -> list[int]:
        """Of what was hashed; after `behind`."""
        return [finish(lanes, self._storage.shape[1]) for lanes in self._hashed[:num_blocks].tolist()]

    def _make(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._storage.is_cuda)

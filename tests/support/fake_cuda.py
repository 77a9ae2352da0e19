"""torch.cuda's streams and events on a CPU, as late as a device may be: what is enqueued on a stream happens only when
somebody waits for it, on the host. So whoever reads a copy too early, or frees its source, finds wrong bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from relevo.engine.gpu.block_streams import hash_lanes

_VIEWS = (torch.ops.aten.select.int, torch.ops.aten.slice.Tensor, torch.ops.aten.detach.default)


class FakeCuda:
    """What BlockStreams takes for torch.cuda. Streams are made here; `compute` is the current one.

    copied: so many blocks have been copied
    hashed: and so many hashed
    registered: address → bytes of host memory that the device knows
    fail_after: so many copies are enqueued, then one is an error
    before_hashing: called when blocks have been copied, and are hashed next
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.copied = self.hashed = 0
        self.registered: dict[int, int] = {}
        self.refuses_memory = False
        self.fail_after: int | None = None
        self.before_hashing: Callable[[], None] = lambda: None
        self._streams: list[FakeStream] = []
        self.compute = self.Stream(torch.device("cpu"))
        self._current = threading.local()

    def Stream(self, _device: torch.device) -> FakeStream:
        self._streams.append(FakeStream(self))
        return self._streams[-1]

    @property
    def is_idle(self) -> bool:
        """Nothing is under way."""
        return all(stream.is_idle for stream in self._streams)

    def enqueue_copy(self) -> None:
        """Raises RuntimeError if this one is to fail."""
        if self.fail_after == 0:
            self.fail_after = None
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.fail_after is not None:
            self.fail_after -= 1

    def Event(self, *, blocking: bool = False) -> FakeEvent:
        return FakeEvent(blocking)

    def device(self, _device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    def set_device(self, _device: torch.device) -> None:
        pass

    def synchronize(self, _device: torch.device) -> None:
        for stream in self._streams:
            stream.run(stream.num_enqueued)

    def current_stream(self, _device: torch.device) -> FakeStream:
        return self.compute

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self._current.stream = stream
        with _Enqueueing(self, stream):
            yield

    def hashing(self, storage: Tensor, block_ids: Tensor) -> Tensor:
        """hash_lanes on the stream."""
        with _disable_current_modes():
            lanes = torch.zeros(len(block_ids), 8, dtype=torch.int64)

        def hash_them() -> None:
            self.before_hashing()
            lanes.copy_(hash_lanes(storage, block_ids))
            self.hashed += len(block_ids)

        self._current.stream.enqueue(hash_them)
        return lanes

    def cudart(self) -> FakeCuda:
        return self

    def cudaHostRegister(self, address: int, num_bytes: int, _flags: int) -> int:
        if self.refuses_memory:
            return 2
        self.registered[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0

    def cudaGetErrorString(self, _error: int) -> str:
        return "out of memory"


class FakeStream:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._work: list[Callable[[], None]] = []
        self._num_done = 0

    @property
    def num_enqueued(self) -> int:
        return len(self._work)

    @property
    def is_idle(self) -> bool:
        return self._num_done == len(self._work)

    def enqueue(self, work: Callable[[], None]) -> None:
        with self._cuda.lock:
            self._work.append(work)

    def wait_event(self, event: FakeEvent) -> None:
        stream, position = event.place()  # as it is recorded now
        self.enqueue(lambda: stream.run(position))

    def run(self, until: int) -> None:
        with self._cuda.lock, _disable_current_modes():
            while self._num_done < until:
                self._num_done += 1
                self._work[self._num_done - 1]()


class FakeEvent:
    def __init__(self, blocking: bool) -> None:
        self._blocking = blocking
        self._place: tuple[FakeStream, int] | None = None

    def record(self, stream: FakeStream) -> None:
        self._place = (stream, stream.num_enqueued)

    def synchronize(self) -> None:
        assert self._blocking, "a host that waits for this spins"
        stream, position = self.place()
        stream.run(position)

    def place(self) -> tuple[FakeStream, int]:
        assert self._place is not None, "not recorded"
        return self._place


class _Enqueueing(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Copies of tensors go onto the stream; all else must be views."""

    def __init__(self, cuda: FakeCuda, stream: FakeStream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._cuda = cuda
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            assert func in _VIEWS, f"{func} would not be on the stream"
            return func(*args, **(kwargs or {}))
        target, source, *non_blocking = args
        assert non_blocking == [True] or self._stream is self._cuda.compute, "the host would wait for it"
        self._cuda.enqueue_copy()
        into, out_of = target.numpy(), source.numpy()

        def copy() -> None:
            np.copyto(into, out_of)
            self._cuda.copied += target.dtype == torch.uint8

        self._stream.enqueue(copy)
        return target

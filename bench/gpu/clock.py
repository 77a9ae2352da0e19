"""Time: what a part may take, and what a kernel takes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

FLUSH_BYTES = 512 << 20  # written before each timed call: cold caches, and work for the GPU while the call is launched
FLUSHES = 2
GRACE_SECONDS = 2.0  # for a loop to notice by itself


class OutOfTime(BaseException):
    """A part has used up its seconds. Not an Exception: nothing on the way up may take it for its own failure."""


class Deadline:
    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        return self._ends_at - time.monotonic()

    def check(self) -> None:
        """Raises OutOfTime behind the end. For loops, between two steps."""
        if self.seconds_left <= 0:
            raise OutOfTime


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread if the block takes longer: for what has no loop of ours."""

    def raise_it(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 3) -> float:
    """Median seconds of a call on the device, its caches cold; on a CPU by the wall clock, warm."""
    for _ in range(warm_up):
        call()
    synchronize(device)
    if device.type != "cuda":
        return median(_wall_seconds(call) for _ in range(repeats))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    make_event: Any = torch.cuda.Event
    events = [(make_event(enable_timing=True), make_event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        for _ in range(FLUSHES):
            flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return median(float(begin.elapsed_time(end)) / 1e3 for begin, end in events)


def _wall_seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started

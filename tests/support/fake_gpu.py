"""A GPU's memory in place of torch.cuda's and the driver's: what is taken of it, and by whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

import pytest
import torch

from relevo.engine.gpu import memory as gpu_memory
from relevo.engine.gpu import start as gpu_start

GIB = 1 << 30
NAME = UUID(int=7)


@dataclass
class Process:
    """One with a CUDA context, or without one yet. context: its bytes, with those of kernels' code."""

    context: int = 0
    allocated: int = 0
    cached: int = 0  # by torch, beside what is allocated
    peak: int = 0

    @property
    def reserved(self) -> int:
        return self.allocated + self.cached

    @property
    def taken(self) -> int:
        return self.context + self.reserved


@dataclass
class FakeGpu:
    """others: held by processes that are none of ours; running: whose torch.cuda this is at the moment"""

    total: int = 80 * GIB
    others: int = 0
    context_bytes: int = GIB // 2
    has_nvml: bool = True
    processes: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.running = self.new_process()

    def new_process(self) -> Process:
        """Runs from now on."""
        self.running = Process()
        self.processes.append(self.running)
        return self.running

    @property
    def free(self) -> int:
        return self.total - self.others - sum(process.taken for process in self.processes)

    def allocate(self, num_bytes: int) -> None:
        process = self.running
        from_cache = num_bytes if process.cached >= num_bytes else 0  # never in two pieces
        if num_bytes - from_cache > self.free:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {num_bytes / GIB:.2f} GiB. GPU 0 has a total capacity of …"
            )
        process.cached -= from_cache
        process.allocated += num_bytes
        process.peak = max(process.peak, process.allocated)

    def release(self, num_bytes: int) -> None:
        """torch keeps it."""
        self.running.allocated -= num_bytes
        self.running.cached += num_bytes

    @contextmanager
    def allocated(self, num_bytes: int) -> Iterator[None]:
        self.allocate(num_bytes)
        yield
        self.release(num_bytes)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (
            "mem_get_info",
            "memory_reserved",
            "memory_allocated",
            "max_memory_allocated",
            "reset_peak_memory_stats",
            "empty_cache",
            "synchronize",
            "is_initialized",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(gpu_memory, "_allocate_once", self._allocate_once)
        monkeypatch.setattr(gpu_memory, "free_bytes", lambda uuid: self.free if self.has_nvml else None)
        monkeypatch.setattr(gpu_start, "device_uuid", lambda index: NAME)

    def _allocate_once(self, device: torch.device, num_bytes: int) -> None:
        with self.allocated(num_bytes):
            pass

    def _mem_get_info(self, device: torch.device) -> tuple[int, int]:
        if not self.running.context:
            self.running.context = self.context_bytes
        return self.free, self.total

    def _memory_reserved(self, device: torch.device) -> int:
        return self.running.reserved

    def _memory_allocated(self, device: torch.device) -> int:
        return self.running.allocated

    def _max_memory_allocated(self, device: torch.device) -> int:
        return self.running.peak

    def _reset_peak_memory_stats(self, device: torch.device) -> None:
        self.running.peak = self.running.allocated

    def _empty_cache(self) -> None:
        self.running.cached = 0

    def _synchronize(self, device: torch.device) -> None:
        pass

    def _is_initialized(self) -> bool:
        return self.running.context > 0

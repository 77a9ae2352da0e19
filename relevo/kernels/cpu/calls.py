"""Calling a compiled function with as little in the way as Python allows.

A model calls the small kernels five times a layer, most of them on a few kilobytes: what a call costs beyond its work
shows. So arguments go into a buffer that the calling thread keeps, and small work is done at once, on that thread and
without giving up the GIL.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable

import torch

from relevo.kernels.cpu.jit import CFunction
from relevo.kernels.cpu.openmp import run_on_threads

CHUNKS_PER_THREAD = 4  # enough that a thread which lost its core for a while does not hold up the others
WORTH_THREADS = 1 << 15  # elements; below, one thread is done before others would have begun


class _Record(threading.local):
    """Memory for a call's arguments: one for each Python thread, since several may call at the same time."""

    def __init__(self, size: int) -> None:
        self.buffer = bytearray(size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))


class _Scratch(threading.local):
    memory = torch.empty(0, dtype=torch.uint8)


_scratch = _Scratch()


def scratch(num_bytes: int) -> int:
    """The address of working memory of this thread's own, aligned to 64 bytes, until it asks again."""
    if _scratch.memory.numel() < num_bytes:
        _scratch.memory = torch.empty(num_bytes, dtype=torch.uint8)
    return _scratch.memory.data_ptr()


class Call:
    """A compiled function `void work(Arguments *)` that does rows of work.

    Arguments is a NamedTuple that begins with what `run` fills in: `counter`, from which threads take chunks of work,
    `workers`, from which they take a number of their own, `chunk`, how many rows that is, and `rows`. The last `floats`
    of its fields are float64, the others int64.
    """

    def __init__(self, build: Callable[[], CFunction], arguments: type[tuple[int | float, ...]], floats: int) -> None:
        num_fields = len(arguments._fields)  # type: ignore[attr-defined]  # a NamedTuple's
        layout = struct.Struct(f"@{num_fields - floats}q{floats}d")
        self._pack = layout.pack_into
        self._record = _Record(layout.size)
        self._build = build
        self._compiled: CFunction | None = None
        self._call_here: Callable[[int], None] | None = None

    def compile(self) -> CFunction:
        """Compile, or load from disk, unless that has happened."""
        if self._compiled is None:
            compiled = self._build()
            self._call_here = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
            self._compiled = compiled
        return self._compiled

    def run(self, rows: int, elements: int, *arguments: float) -> None:
        """Do so many rows of work, of about so many elements each."""
        record = self._record
        if rows * elements < WORTH_THREADS:
            self._pack(record.buffer, 0, 0, 0, rows, rows, *arguments)
            if self._call_here is None:
                self.compile()
            self._call_here(record.address)  # type: ignore[misc]
            return
        threads = torch.get_num_threads()
        self._pack(record.buffer, 0, 0, 0, max(1, rows // (threads * CHUNKS_PER_THREAD)), rows, *arguments)
        run_on_threads(self.compile().address, record.address, min(threads, rows))

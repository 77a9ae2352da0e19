"""Makes the C library keep freed memory for the next step, where it would give it back to the kernel.

A step allocates temporaries of megabytes and frees them again. By default glibc maps blocks of more than 32 MiB one by
one, and shrinks a heap whose end is free; either way the kernel takes the pages, and the next layer faults them in
again, zeroed. Set here by mallopt, so that it holds in a container, in `LLM` and wherever else an engine is built:
environment variables would have to be there before the process is.

Other C libraries (musl, macOS) have no mallopt: nothing happens there.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from contextlib import suppress

logger = logging.getLogger(__name__)

# https://sourceware.org/glibc/manual/latest/html_node/Malloc-Tunable-Parameters.html
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_NEVER_TRIM = 2**31 - 1
_TOP_PAD_BYTES = 64 << 20  # also what keeps the heaps of threads, of 64 MiB each, from being unmapped
# Before 2.35 glibc refuses more than 32 MiB; larger blocks are mapped one by one there.
_MMAP_THRESHOLDS = (1 << 30, 32 << 20)


def use_one_heap() -> bool:
    """Threads share the main heap: one of their own has no room for blocks beyond 64 MiB, which are mapped one by one.

    For a process whose engine computes in a thread. Must come before there are threads: the heap of one that has ended
    (importing torch leaves some) goes to the next. False where that can't be had.
    """
    mallopt = _mallopt()
    return mallopt is not None and mallopt(_M_ARENA_MAX, 1) == 1


def keep_freed_memory() -> bool:
    """Give back what is free now (loading a model leaves much), and from now on nothing. False where that can't be had.

    RSS stays at the largest that steps ever needed.
    """
    mallopt = _mallopt()
    if mallopt is None:
        return False
    give_back_memory()
    # In this order: the threshold must not be left at its default of 128 KiB, which any of these options fixes.
    accepted = [
        any(mallopt(_M_MMAP_THRESHOLD, size) == 1 for size in _MMAP_THRESHOLDS),
        mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM) == 1,
        mallopt(_M_TOP_PAD, _TOP_PAD_BYTES) == 1,
    ]
    if not all(accepted):
        logger.debug("malloc took only some of its options: %s", accepted)
    return all(accepted)


def give_back_memory() -> None:
    """What is free now goes back to the kernel, as far as whole pages of it are free; once, after a start, say."""
    with suppress(AttributeError):
        _libc().malloc_trim(0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _mallopt() -> Callable[[int, int], int] | None:
    try:
        function = _libc().mallopt
    except AttributeError:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int)
    function.restype = ctypes.c_int
    return lambda option, value: int(function(option, value))

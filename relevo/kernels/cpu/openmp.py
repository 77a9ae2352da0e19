"""Parallel regions on torch's own threads.

numba's `omp` layer links another copy of libgomp than torch does (measured with torch 2.13 and numba 0.68: both are
mapped), so that each pool's idle threads spin while the other one works; its `workqueue` layer must not be entered by
two Python threads at once. So compiled functions are called through GOMP_parallel, found among the libraries that
torch itself is linked with (GNU, LLVM and Intel OpenMP on Linux all have it): one pool, safe from several threads.
As with torch itself, a process that has computed must not fork and compute in the child.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

ParallelRegion = Callable[[int, bytes | int, int], None]


def run_on_threads(function: int, data: bytes | int, num_threads: int) -> None:
    """Call the C function `void f(void *data)` at an address once on each of so many threads, without the GIL.

    data: what to hand it, or where that lies
    """
    _parallel_region()(function, data, num_threads)


@cache
def _parallel_region() -> ParallelRegion:
    call = _find_gomp_parallel()
    if call is None:
        logger.warning("torch's OpenMP has no GOMP_parallel: attention on the CPU runs on one thread")
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        return lambda function, data, num_threads: prototype(function)(data)
    return lambda function, data, num_threads: call(function, data, num_threads, 0)


def _find_gomp_parallel() -> Callable[[int, bytes | int, int, int], None] | None:
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
    for library in libraries:
        try:
            call = ctypes.CDLL(str(library)).GOMP_parallel  # looks through what the library is linked with, too
        except (OSError, AttributeError):
            continue
        call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        call.restype = None
        return call
    return None

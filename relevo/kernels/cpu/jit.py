"""numba's decorators, with types, and with a disk cache that notices every change to this package."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import numba
from numba import types
from numba.core import event
from numba.extending import intrinsic as numba_intrinsic

from relevo.kernels.disk_cache import kept_on_disk

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 30  # of everything, on one core of 2021; measured, for the log


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile for use by other compiled functions; what Python calls keeps it on disk along with itself."""
    return cast("Callable[P, R]", numba.njit(error_model="numpy")(function))


def entry_point(function: Callable[P, R]) -> Callable[P, R]:
    """Compile at the first call from Python; releases the GIL, and keeps its machine code on disk."""
    return cast("Callable[P, R]", kept_on_disk(numba.njit, function, nogil=True, error_model="numpy"))


class CFunction(Protocol):
    """Compiled code, in memory for as long as this object is."""

    address: int


def callback(function: Callable[[int], None]) -> CFunction:
    """Compile now a C function of one pointer; keeps its machine code on disk.

    It runs on threads that Python does not know: it must not raise, and must not own arrays.
    """
    signature = types.void(types.int64)
    return cast(CFunction, kept_on_disk(numba.cfunc, function, signature, error_model="numpy"))


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that emits LLVM instructions: (typing context, *argument types) to (signature, generator)."""
    return cast("Callable[..., Any]", numba_intrinsic(function))


def sources_digest() -> int:
    """A fingerprint of this package's source, under 2**31.

    numba keeps a function's machine code until that function's own file changes, although code from other
    files is compiled into it. It also looks at the function's closure, so whatever is kept closes over this.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:4], "little") >> 1


@contextmanager
def announced() -> Iterator[None]:
    """Says once that it is compiling, if anything in here is compiled instead of loaded from disk."""
    with event.install_listener("numba:compile", _Announcement()):
        yield


class _Announcement(event.Listener):
    def __init__(self) -> None:
        self._told = False

    def on_start(self, event: Any) -> None:
        if not self._told:
            self._told = True
            logger.warning("compiling the CPU kernels, once for this installation: about %d seconds", COMPILE_SECONDS)

    def on_end(self, event: Any) -> None:
        pass

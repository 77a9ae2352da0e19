"""numba's decorators, with types, and with a disk cache that notices every change to this package."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba
from numba.extending import intrinsic as numba_intrinsic

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile for use by other compiled functions; an entry point caches them with itself."""
    return cast("Callable[P, R]", numba.njit(nogil=True, error_model="numpy")(function))


def entry_point(*, parallel: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Compile for calls from Python: releases the GIL, and keeps its machine code on disk.

    Where no directory can be written (neither beside the source nor under the user's cache; NUMBA_CACHE_DIR
    names another), each process compiles for itself, and says so once per function.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        try:
            compiled = numba.njit(nogil=True, error_model="numpy", parallel=parallel, cache=True)(function)
        except RuntimeError as error:  # what numba raises for "no locator available"
            logger.warning("compiled kernels will not be kept: %s; set NUMBA_CACHE_DIR to a writable directory", error)
            compiled = numba.njit(nogil=True, error_model="numpy", parallel=parallel)(function)
        return cast("Callable[P, R]", compiled)

    return decorate


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that emits LLVM instructions: (typing context, *argument types) to (signature, generator)."""
    return cast("Callable[..., Any]", numba_intrinsic(function))


def sources_digest() -> int:
    """A fingerprint of this package's source, under 2**31.

    numba keeps a function's machine code until that function's own file changes, although code from other
    files is compiled into it. It also looks at the function's closure, so an entry point closes over this.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:4], "little") >> 1

"""Turns: the engines of one host compute one at a time, each with all the cores (docs/adr/0007).

What they share is a file of 256 bytes that each of them maps (in memory, or on any file system that can be mapped):

    [0, 8)      MAGIC, written last by whoever set the file up
    [8, 16)     how often a turn was taken, u64: a holder that hangs does not move it
    [64, 128)   pthread_mutex_t `gate`: held by the one that is next
    [128, 192)  pthread_mutex_t `main`: held by the one whose turn it is

Taking a turn is lock gate, lock main, unlock gate. Who has just had its turn finds the gate locked if anybody waits, so
that two engines alternate and of more none is passed over for long. Both mutexes are shared between processes and
*robust*: the kernel releases what a dying thread holds (https://man7.org/linux/man-pages/man3/pthread_mutexattr_setrobust.3.html).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import time
from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import Any, Self

from relevo.core.errors import StartupError

logger = logging.getLogger(__name__)

MAGIC = b"relevo01"
FILE_BYTES = 256
COUNT_OFFSET, GATE_OFFSET, MAIN_OFFSET = 8, 64, 128
MUTEX_BYTES = 64  # room: glibc and musl need 40 to 48

# A step longer than this is taken for a hang at first, and every mistake doubles it: a mistake costs one step that
# shares the cores, a hang that is not noticed stops all engines of the host.
FIRST_PATIENCE_SECONDS = 5.0
MAX_PATIENCE_SECONDS = 120.0

_PTHREAD_PROCESS_SHARED = 1
_PTHREAD_MUTEX_ROBUST = 1


class Turns:
    """A context manager around computing. One thread of one engine uses it; it costs microseconds when nobody waits.

    path: the file, made and set up by the first that comes

    An engine that keeps its turn for longer than the others' patience seems to hang: they say so and go on beside it,
    and wait again as soon as turns are taken again. Raises StartupError if the file can't be shared, or the platform
    has no robust mutexes.
    """

    def __init__(self, path: str, *, patience_seconds: float = FIRST_PATIENCE_SECONDS) -> None:
        self._libc = _libc()
        self._patience_seconds = patience_seconds
        self._given_up_at: int | None = None  # the number of the turn whose holder seemed to hang
        self._has_turn = False
        self._memory = _map(path, self._libc)
        self._count = ctypes.c_uint64.from_buffer(self._memory, COUNT_OFFSET)
        self._gate = _Mutex(self._libc, self._memory, GATE_OFFSET)
        self._main = _Mutex(self._libc, self._memory, MAIN_OFFSET)

    @property
    def num_turns(self) -> int:
        """Taken so far, by all engines."""
        return self._count.value

    def __enter__(self) -> Self:
        assert not self._has_turn
        if self._given_up_at is not None and self._given_up_at != self._count.value:
            self._wait_again()
        if self._given_up_at is None:
            self._has_turn = self._wait()
        elif self._take(0.0):
            self._has_turn = True
            self._wait_again()
        if self._has_turn:
            self._count.value += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._has_turn:
            self._has_turn = False
            self._main.unlock()

    def _wait(self) -> bool:
        """As long as others take turns; False when one of them seems to hang."""
        while True:
            count = self._count.value
            if self._take(self._patience_seconds):
                return True
            if self._count.value == count:
                break
            self._double_patience()  # there are many of us: whoever stops waiting at the gate loses its place
        logger.warning(
            "an engine on this host has been in one step for %g s: computing beside it", self._patience_seconds
        )
        self._given_up_at = count
        return False

    def _wait_again(self) -> None:
        self._given_up_at = None
        self._double_patience()
        logger.info("turns are taken again: waiting for up to %g s from now on", self._patience_seconds)

    def _double_patience(self) -> None:
        self._patience_seconds = min(2 * self._patience_seconds, MAX_PATIENCE_SECONDS)

    def _take(self, seconds: float) -> bool:
        deadline = time.time() + seconds
        if not self._gate.lock(deadline):
            return False
        try:
            return self._main.lock(deadline)
        finally:
            self._gate.unlock()


class _Mutex:
    """A robust mutex in shared memory."""

    def __init__(self, libc: ctypes.CDLL, memory: mmap.mmap, offset: int) -> None:
        self._libc = libc
        self._bytes = (ctypes.c_char * MUTEX_BYTES).from_buffer(memory, offset)
        self._address = ctypes.addressof(self._bytes)

    def lock(self, deadline: float) -> bool:
        """False if it can't be had before `deadline`, in time.time()'s seconds. The GIL is released meanwhile."""
        seconds, rest = divmod(deadline, 1.0)
        until = _Timespec(int(seconds), int(rest * 1e9))
        code = self._libc.pthread_mutex_timedlock(self._address, ctypes.byref(until))
        if code == errno.ETIMEDOUT:
            return False
        if code == errno.EOWNERDEAD:  # ours now; there is no state that its last owner could have left half done
            code = self._libc.pthread_mutex_consistent(self._address)
        _check(code)
        return True

    def unlock(self) -> None:
        _check(self._libc.pthread_mutex_unlock(self._address))


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _map(path: str, libc: ctypes.CDLL) -> mmap.mmap:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(f"the file of turns {path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # the second to come finds it set up
        is_new = os.fstat(fd).st_size < FILE_BYTES
        if is_new:
            os.ftruncate(fd, FILE_BYTES)
        memory = mmap.mmap(fd, FILE_BYTES)
        if memory[: len(MAGIC)] != MAGIC:
            if not is_new and any(memory):
                raise StartupError(f"{path} is no file of turns; remove it, or choose another")
            for offset in (GATE_OFFSET, MAIN_OFFSET):
                _init_mutex(libc, memory, offset)
            memory[: len(MAGIC)] = MAGIC
    except (OSError, ValueError) as error:
        raise StartupError(f"the file of turns {path} cannot be shared: {error}") from error
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough: mmap keeps a duplicate
        os.close(fd)
    return memory


def _init_mutex(libc: ctypes.CDLL, memory: mmap.mmap, offset: int) -> None:
    mutex = (ctypes.c_char * MUTEX_BYTES).from_buffer(memory, offset)
    attributes = ctypes.create_string_buffer(MUTEX_BYTES)
    _check(libc.pthread_mutexattr_init(attributes))
    _check(libc.pthread_mutexattr_setpshared(attributes, _PTHREAD_PROCESS_SHARED))
    _check(libc.pthread_mutexattr_setrobust(attributes, _PTHREAD_MUTEX_ROBUST))
    _check(libc.pthread_mutex_init(ctypes.byref(mutex), attributes))


def _check(code: int) -> None:
    assert code == 0, f"a mutex: {os.strerror(code)}"


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    arguments: dict[str, tuple[Any, ...]] = {
        "pthread_mutexattr_init": (ctypes.c_void_p,),
        "pthread_mutexattr_setpshared": (ctypes.c_void_p, ctypes.c_int),
        "pthread_mutexattr_setrobust": (ctypes.c_void_p, ctypes.c_int),
        "pthread_mutex_init": (ctypes.c_void_p, ctypes.c_void_p),
        "pthread_mutex_timedlock": (ctypes.c_void_p, ctypes.c_void_p),
        "pthread_mutex_consistent": (ctypes.c_void_p,),
        "pthread_mutex_unlock": (ctypes.c_void_p,),
    }
    for name, types in arguments.items():
        try:
            function: Callable[..., int] = getattr(libc, name)
        except AttributeError:
            raise StartupError(f"engines can't take turns on this platform: its C library has no {name}") from None
        function.argtypes = types  # type: ignore[attr-defined]  # a ctypes function, which its stubs call Any
    return libc

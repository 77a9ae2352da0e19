"""Engines that share a GPU start one after another.

An engine finds out what it takes of a GPU by what is free before and after. If another one loads its weights in
between, they would count as the first one's, and both would take memory for their KV that the other counts on. So from
its first touch of a GPU until its KV cache and graphs are there, an engine holds a lock: a file, named after the GPU.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

import torch

from relevo.engine.gpu.driver import device_uuid
from relevo.engine.gpu.memory import GpuMemory, first_touch
from relevo.engine.shortage import explain_shortage

logger = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 600.0  # for one that hangs
_POLL_SECONDS = 0.1


@contextmanager
def start_on(device: torch.device, lock_dir: str | None) -> Iterator[GpuMemory | None]:
    """On a GPU: alone, and with its memory as it was before. On a CPU: None."""
    if device.type != "cuda":
        yield None
        return
    index = _index(device)
    uuid = device_uuid(index)
    with _lock(Path(lock_dir or gettempdir()) / f"relevo-gpu-{uuid or index}.lock"):
        with explain_shortage(device, "a CUDA context", "end what else uses this GPU"):
            memory = first_touch(device, uuid)
        yield memory


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Released by the kernel too, when its holder dies. Goes on without it, with a warning, if it can't be had."""
    try:
        fd = _open(path)
    except OSError as error:
        logger.warning("%s: %s; start no other engine on this GPU meanwhile", path, error.strerror)
        yield
        return
    try:
        _acquire(fd, path)
        yield
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # another user's, say: reading is enough to lock
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _acquire(fd: int, path: Path) -> None:
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    waits = False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                logger.warning("%s: still locked after %g s; going on without it", path, MAX_WAIT_SECONDS)
                return
            if not waits:
                logger.info("waiting for another engine to have started on this GPU")
            waits = True
            time.sleep(_POLL_SECONDS)
        else:
            return

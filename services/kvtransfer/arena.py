"""The arena: a file in a tmpfs, mapped by the agent and by its workers.

Why a named file, and neither a memfd nor an unlinked file reached through /proc/<pid>/fd: a name in a shared tmpfs
works between containers as it does between processes, with file permissions for access control; the others need a
common PID namespace and the right to look into another process. The price is that a killed agent leaves its file
behind. So the agent holds a lock (flock) on it as long as it lives, the kernel drops that lock however the agent ends,
and every start removes the arenas whose lock is free. Unlike a PID, a lock means the same in every container.

The file has mode 0600 and lies in a folder of its user's with mode 0700: another user can neither open nor find it.

The file is never truncated and all of its memory is allocated at the start: no access to a mapping can ever fault,
also not after the agent's end, when its workers still have the file mapped.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from relevo.core.errors import Mismatch, StartupError
from relevo.core.sizes import format_size

logger = logging.getLogger(__name__)

_PREFIX = "kv-"
_SUFFIX = ".arena"
_CGROUP = Path("/sys/fs/cgroup")  # of this container, where it has one of its own (version 2)


class Arena:
    """A file of fixed size, cut into slots of equal, page-aligned size by `cut`."""

    def __init__(self, directory: Path, num_bytes: int) -> None:
        """Create it and allocate its memory. Raises StartupError saying what to change."""
        self.num_bytes = num_bytes
        self.block_bytes = 0  # 0: not cut yet
        self.slot_bytes = 0
        self.num_slots = 0
        folder = directory / f"relevo-{os.getuid()}"
        remove_stale_arenas(folder)
        _check_space(directory, num_bytes)
        self.path, fd = _create(folder)
        self.file: BinaryIO = os.fdopen(fd, "rb+", buffering=0)  # for sendfile
        try:
            os.posix_fallocate(fd, 0, num_bytes)
            self._map = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED)
        except OSError as error:
            self.close()
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise StartupError(
                    f"cannot allocate {format_size(num_bytes)} in {directory}: {error.strerror}"
                ) from error
            raise StartupError(_no_space(directory, num_bytes, _free_bytes(directory))) from error
        self._view = memoryview(self._map)

    def cut(self, block_bytes: int) -> None:
        """Cut it into as many slots for block_bytes as fit. Raises Mismatch if none does."""
        slot_bytes = slot_bytes_for(block_bytes)
        if not 0 < slot_bytes <= self.num_bytes:
            raise Mismatch(
                f"a block of {block_bytes} bytes does not fit an arena of {format_size(self.num_bytes)}:"
                " give the agent a larger --kv-arena"
            )
        self.block_bytes = block_bytes
        self.slot_bytes = slot_bytes
        self.num_slots = self.num_bytes // slot_bytes

    @property
    def view(self) -> memoryview:
        """All of it."""
        return self._view

    def slot(self, slot: int) -> memoryview:
        """A slot's bytes, writable."""
        assert 0 <= slot < self.num_slots
        return self._view[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def block(self, slot: int) -> memoryview:
        """The block in a slot: its first block_bytes, writable."""
        return self.slot(slot)[: self.block_bytes]

    def close(self) -> None:
        """Remove the file. Its memory is freed when the last process that has it mapped is gone."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # other agents' arenas are in there
            self.path.parent.rmdir()
        self.file.close()


def slot_bytes_for(block_bytes: int) -> int:
    """block_bytes, rounded up to a page."""
    return -(-block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def remove_stale_arenas(directory: Path) -> None:
    """Remove the arenas of agents that were killed: those that nobody has locked."""
    for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or another user's
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            logger.info("removed %s, left behind by an agent that was killed", path)
        except OSError:
            continue  # locked: its agent lives
        finally:
            os.close(fd)


def _create(folder: Path) -> tuple[Path, int]:
    """A new file with mode 0600 in a folder with mode 0700, locked by us."""
    while True:
        path = folder / f"{_PREFIX}{uuid.uuid4().hex}{_SUFFIX}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            _check_private(folder)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # another agent has just ended, and removed the folder
        except OSError as error:
            raise StartupError(f"--arena-dir: cannot create a file in {folder}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():
                return path, fd
        except OSError:
            pass  # another agent's remove_stale_arenas saw it before it was locked, and is removing it: make another
        os.close(fd)


def _check_private(folder: Path) -> None:
    """Anybody may have made it before us, in a directory that all may write to."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StartupError(
            f"{folder} must be a directory of user {os.getuid()} with mode 0700: remove it, or choose another"
            " --arena-dir"
        )


def _check_space(directory: Path, num_bytes: int) -> None:
    if not directory.is_dir():
        raise StartupError(f"--arena-dir {directory} is not a directory: name one in a tmpfs, such as /dev/shm")
    free_bytes = _free_bytes(directory)
    if num_bytes > free_bytes:
        raise StartupError(_no_space(directory, num_bytes, free_bytes))
    room = container_memory_left(_CGROUP)
    if room is not None and num_bytes > room:
        raise StartupError(
            f"--kv-arena {format_size(num_bytes)} does not fit into this container's memory, of which"
            f" {room >> 20}MiB are left: shared memory counts there too; make it smaller or raise the limit (--memory)"
        )


def container_memory_left(cgroup: Path) -> int | None:
    """Bytes that the memory limit leaves, page cache counted as free; None without a limit."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((cgroup / "memory.current").read_text())
        figures = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(figures.get("inactive_file", 0)) + int(figures.get("active_file", 0))
    except (OSError, ValueError):
        return None


def _free_bytes(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _no_space(directory: Path, num_bytes: int, free_bytes: int) -> str:
    return (
        f"--kv-arena {format_size(num_bytes)} does not fit into {directory}, which has {free_bytes >> 20}MiB free:"
        f" make it smaller, enlarge the tmpfs (Docker gives /dev/shm 64MiB: --shm-size {_suggested(num_bytes)}, or"
        " shm_size in compose.yaml), or choose another --arena-dir"
    )


def _suggested(num_bytes: int) -> str:
    """A size with some room, as docker takes it."""
    return f"{-(-num_bytes * 9 // 8) >> 20 or 1}m"

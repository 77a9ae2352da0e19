"""The disk tier's files. Plain blocking functions, for threads.

    DIR/relevo-blocks-v1/ab/ab…(64 hex digits of the name)-<block_bytes>.kv

The folder is ours alone (mode 0700), the files have mode 0600. A file is written under another name and renamed when it
is complete. Nothing is synced: what a crash of the machine leaves half written has a wrong checksum.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from relevo.core.block_hash import BlockHash
from relevo.core.errors import StartupError
from services.kvtransfer.tiers import SealedBlock
from services.kvtransfer.tiers.record import HEADER_BYTES, is_intact, pack_header, verified_checksum

FOLDER = "relevo-blocks-v1"
_NAME = re.compile(r"([0-9a-f]{64})-([0-9]{1,12})\.kv")
_TEMPORARY = ".tmp"
_LOCK = "lock"
_DISK_PAGE = 4096


@dataclass
class ReadResult:
    """checksums: one a block, None for what can't be had. gone: names whose files are not there (any more)."""

    checksums: list[int | None] = field(default_factory=list)
    damaged: list[BlockHash] = field(default_factory=list)  # their files are removed
    gone: list[BlockHash] = field(default_factory=list)
    error: OSError | None = None  # the device failed: nothing was read from there on


@dataclass
class WriteResult:
    stored: list[BlockHash] = field(default_factory=list)
    damaged: list[BlockHash] = field(default_factory=list)  # in the arena: not what was sealed
    error: OSError | None = None  # nothing was written from there on


def open_folder(directory: Path) -> tuple[Path, BinaryIO]:
    """Our folder in the directory, made if need be, and its lock, held until closed. Raises StartupError."""
    folder = directory / FOLDER
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise StartupError(f"--kv-disk: {folder} must be a directory of user {os.getuid()} with mode 0700")
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StartupError(f"--kv-disk {directory}: {error.strerror}; name a directory to write to") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise StartupError(f"--kv-disk {directory} is in use by another agent: give each one its own") from error
    return folder, os.fdopen(lock, "rb")


def disk_bytes(block_bytes: int) -> int:
    """What a block takes on the disk."""
    return -(-(block_bytes + HEADER_BYTES) // _DISK_PAGE) * _DISK_PAGE


def scan(folder: Path) -> Iterator[list[tuple[BlockHash, int]]]:
    """(name, block_bytes) of the files that are there, a subfolder at a time; removes what was left half written.

    Reads directories only, opens no file. Foreign files are let alone, and never served.
    """
    for subfolder in sorted(folder.glob("[0-9a-f][0-9a-f]")):
        found = []
        with suppress(OSError), os.scandir(subfolder) as entries:  # an unreadable one holds nothing for us
            for entry in entries:
                if match := _NAME.fullmatch(entry.name):
                    found.append((bytes.fromhex(match[1]), int(match[2])))
                elif entry.name.endswith(_TEMPORARY):
                    Path(entry.path).unlink(missing_ok=True)
        yield found


def read_blocks(folder: Path, blocks: Sequence[tuple[BlockHash, memoryview]]) -> ReadResult:
    """Read each into its memory, and check it there."""
    result = ReadResult()
    for name, into in blocks:
        checksum = None
        if result.error is None:
            try:
                checksum = _read(_path(folder, name, len(into)), name, into)
                if checksum is None:
                    result.damaged.append(name)
                    remove(folder, name, len(into))
            except FileNotFoundError:
                result.gone.append(name)
            except OSError as error:
                result.error = error
        result.checksums.append(checksum)
    return result


def write_blocks(folder: Path, blocks: Sequence[SealedBlock]) -> WriteResult:
    """Write those that are what their checksums say."""
    result = WriteResult()
    for block in blocks:
        if not is_intact(block.block, block.checksum):
            result.damaged.append(block.name)
            continue
        try:
            _write(_path(folder, block.name, len(block.block)), block)
        except OSError as error:
            result.error = error
            return result
        result.stored.append(block.name)
    return result


def remove(folder: Path, name: BlockHash, block_bytes: int) -> None:
    """Raises OSError. Removing what is not there is harmless."""
    _path(folder, name, block_bytes).unlink(missing_ok=True)


def _path(folder: Path, name: BlockHash, block_bytes: int) -> Path:
    text = name.hex()
    return folder / text[:2] / f"{text}-{block_bytes}.kv"


def _read(path: Path, name: BlockHash, into: memoryview) -> int | None:
    """The checksum, None if the file is not this block. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None  # a symbolic link: not ours
        raise
    try:
        if os.fstat(fd).st_size != HEADER_BYTES + len(into):
            return None
        header = bytearray(HEADER_BYTES)
        done = os.preadv(fd, [header, into], 0)
        while done < HEADER_BYTES + len(into):
            count = os.preadv(fd, [into[done - HEADER_BYTES :]], done) if done >= HEADER_BYTES else 0
            if not count:
                return None
            done += count
    finally:
        os.close(fd)
    return verified_checksum(bytes(header), name, into)


def _write(path: Path, block: SealedBlock) -> None:
    temporary = path.with_suffix(_TEMPORARY)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            header = pack_header(block.name, len(block.block), block.checksum)
            done = os.writev(fd, [header, block.block])
            while done < HEADER_BYTES + len(block.block):  # cut short by a full disk: the next one says so
                done += os.writev(fd, [header[done:], block.block[max(0, done - HEADER_BYTES) :]])
        finally:
            os.close(fd)
        temporary.rename(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise

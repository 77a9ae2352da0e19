"""The disk tier alone: what it keeps, and everything that can be wrong with files and disks."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from relevo.core.errors import StartupError
from services.kvtransfer.held import HeldNames
from services.kvtransfer.tiers import SealedBlock, disk_files
from services.kvtransfer.tiers.disk import DiskTier
from services.kvtransfer.tiers.disk_files import WriteResult, disk_bytes
from services.kvtransfer.tiers.record import HEADER_BYTES

from .blocks import BLOCK_BYTES, block_data, names, sealed, until

OpenTier = Callable[..., Awaitable[DiskTier]]
FILE_BYTES = disk_bytes(BLOCK_BYTES)


@pytest.fixture
async def open_tier(tmp_path: Path) -> AsyncIterator[OpenTier]:
    """Opens tiers over one directory, which have found what it holds; closed at the end."""
    async with AsyncExitStack() as stack:

        async def open_tier(directory: Path = tmp_path / "kv", **options: Any) -> DiskTier:
            held = HeldNames()
            full: dict[str, Any] = {"max_bytes": 100 * FILE_BYTES, "retry_seconds": 0.05} | options
            tier = DiskTier(directory, on_stored=held.add, on_removed=held.discard, **full)
            stack.push_async_callback(tier.close)
            await tier.run()
            return tier

        yield open_tier


async def read(tier: DiskTier, *labels: object) -> list[bool]:
    """Which of them come back; those that do must be right."""
    into = [memoryview(bytearray(BLOCK_BYTES)) for _ in labels]
    checksums = await tier.read(list(zip(names(*labels), into, strict=True)))
    for label, view, checksum in zip(labels, into, checksums, strict=True):
        if checksum is not None:
            assert bytes(view) == block_data(label)
            assert checksum == sealed(label).checksum
    return [checksum is not None for checksum in checksums]


async def write(tier: DiskTier, *labels: object) -> None:
    assert await tier.write([sealed(label) for label in labels]) == []


def files_in(place: Path | str, pattern: str = "*.kv") -> list[Path]:
    return sorted(Path(place).rglob(pattern))


def file_of(tier: DiskTier, label: object) -> Path:
    [path] = Path(tier.place).rglob(f"{names(label)[0].hex()}-*.kv")
    return path


async def test_what_was_written_is_read_back(open_tier: OpenTier) -> None:
    tier = await open_tier()
    await write(tier, "a", "b", "c")
    assert await tier.holds(names("a", "x", "c"), BLOCK_BYTES) == set(names("a", "c"))
    assert await tier.holds(names("a"), BLOCK_BYTES + 1) == set()
    assert await read(tier, "a", "x", "c") == [True, False, True]
    assert (tier.num_blocks, tier.num_bytes) == (3, 3 * FILE_BYTES)
    assert (tier.counters.stored, tier.counters.hits, tier.counters.damaged) == (3, 2, 0)
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in [Path(tier.place), *files_in(tier.place, "*")]}
    assert modes == {(True, 0o700), (False, 0o600)}


async def test_next_tier_finds_what_is_there(open_tier: OpenTier) -> None:
    first = await open_tier()
    await write(first, *range(50))
    await first.close()
    second = await open_tier()
    assert (second.num_blocks, second.num_bytes) == (50, 50 * FILE_BYTES)
    assert await read(second, *range(50)) == [True] * 50


async def test_smaller_bound_removes_what_is_too_much(open_tier: OpenTier) -> None:
    first = await open_tier()
    await write(first, *range(10))
    await first.close()
    second = await open_tier(max_bytes=4 * FILE_BYTES)
    assert second.num_blocks == 4
    assert len(files_in(second.place)) == 4


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def flip_name(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, HEADER_BYTES + BLOCK_BYTES - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def replace_with_another(path: Path) -> None:
    """A whole, right block, under a name that is not its own."""
    [other] = [each for each in path.parent.parent.rglob("*.kv") if each != path]
    path.write_bytes(other.read_bytes())


def replace_with_text(path: Path) -> None:
    path.write_bytes(b"x" * (HEADER_BYTES + BLOCK_BYTES))


def replace_with_link(path: Path) -> None:
    target = path.with_suffix(".elsewhere")
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "damage", [flip_last_byte, flip_name, truncate, empty, replace_with_another, replace_with_text]
)
async def test_damaged_file_is_dropped_and_never_served(open_tier: OpenTier, damage: Callable[[Path], None]) -> None:
    tier = await open_tier()
    await write(tier, "a", "b")
    path = file_of(tier, "a")
    damage(path)
    assert await read(tier, "a", "b") == [False, True]
    assert not path.exists()
    assert (tier.num_blocks, tier.counters.damaged) == (1, 1)
    assert await tier.holds(names("a", "b"), BLOCK_BYTES) == set(names("b"))
    await write(tier, "a")
    assert await read(tier, "a") == [True]
    assert not tier.reading.trouble


async def test_link_is_not_followed(open_tier: OpenTier) -> None:
    tier = await open_tier()
    await write(tier, "a")
    replace_with_link(file_of(tier, "a"))
    assert await read(tier, "a") == [False]
    assert (tier.counters.damaged, tier.reading.trouble) == (1, "")


async def test_removed_file_is_forgotten(open_tier: OpenTier) -> None:
    tier = await open_tier()
    await write(tier, "a")
    file_of(tier, "a").unlink()
    assert await read(tier, "a") == [False]
    assert (tier.num_blocks, tier.num_bytes) == (0, 0)


async def test_foreign_files_are_let_alone_and_half_written_ones_removed(open_tier: OpenTier) -> None:
    tier = await open_tier()
    await write(tier, "a")
    folder = file_of(tier, "a").parent
    await tier.close()
    half, foreign, beside = folder / "aa.tmp", folder / "notes.txt", Path(tier.place) / "mine.txt"
    for path in (half, foreign, beside):
        path.write_text("something")
    again = await open_tier()
    assert (again.num_blocks, half.exists(), foreign.exists(), beside.exists()) == (1, False, True, True)


async def test_block_that_changed_in_the_arena_is_not_written(open_tier: OpenTier) -> None:
    tier = await open_tier()
    good, bad = sealed("a"), sealed("b")
    bad = SealedBlock(bad.name, bad.checksum ^ 1, bad.block)
    assert await tier.write([good, bad]) == names("b")
    assert (tier.num_blocks, tier.counters.stored) == (1, 1)


async def test_least_recently_used_files_go_first(open_tier: OpenTier) -> None:
    tier = await open_tier(max_bytes=4 * FILE_BYTES)
    await write(tier, "a", "b", "c", "d")
    await tier.holds(names("a", "b"), BLOCK_BYTES)  # used again: its first block is the last to go
    await write(tier, "e", "f", "g")
    assert await tier.holds(names(*"abcdefg"), BLOCK_BYTES) == set(names(*"aefg"))
    assert (tier.num_bytes, tier.counters.evicted) == (4 * FILE_BYTES, 3)
    assert len(files_in(tier.place)) == 4


async def test_what_is_larger_than_the_tier_is_dropped(open_tier: OpenTier) -> None:
    tier = await open_tier(max_bytes=FILE_BYTES - 1)
    await write(tier, "a")
    assert (tier.num_blocks, tier.counters.dropped["too_large"]) == (0, 1)


async def test_clear_removes_the_files(open_tier: OpenTier) -> None:
    tier = await open_tier()
    await write(tier, *range(20))
    assert await tier.clear() == 20
    assert (tier.num_blocks, tier.num_bytes) == (0, 0)
    assert not files_in(tier.place)


async def test_full_disk_stops_writing_with_one_warning_and_is_tried_again(
    open_tier: OpenTier, caplog: pytest.LogCaptureFixture
) -> None:
    full = True

    def write_blocks(folder: Path, blocks: Sequence[SealedBlock]) -> WriteResult:
        if full:
            return WriteResult(error=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return disk_files.write_blocks(folder, blocks)

    tier = await open_tier(write_blocks=write_blocks)
    caplog.set_level(logging.INFO)
    for attempt in range(3):
        await write(tier, "a", "b")
        assert tier.writing.is_open
        assert "no space left" in tier.writing.trouble
        assert tier.counters.dropped["failed"] == 2 * (attempt + 1)
        await until(lambda: not tier.writing.is_open)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    full = False
    await write(tier, "a", "b")
    assert not tier.writing.trouble
    assert await read(tier, "a", "b") == [True, True]
    assert "works again" in caplog.records[-1].message


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for some 12 blocks."""
    place = tmp_path / "tiny"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={16 * FILE_BYTES}", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here: needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


async def test_real_full_disk_leaves_no_half_file(tiny_disk: Path, tmp_path: Path) -> None:
    held = HeldNames()
    tier = DiskTier(tiny_disk, 1 << 30, 0.05, held.add, held.discard)
    for start in range(0, 24, 4):
        await write(tier, *range(start, start + 4))
    assert "no space left" in tier.writing.trouble
    assert 4 <= tier.num_blocks < 24
    assert len(files_in(tiny_disk, "*.kv")) == tier.num_blocks
    assert not files_in(tiny_disk, "*.tmp")
    found = await tier.holds(names(*range(24)), BLOCK_BYTES)
    labels = [label for label, name in enumerate(names(*range(24))) if name in found]
    assert await read(tier, *labels) == [True] * len(labels), "a full disk can be read from"
    await tier.clear()
    await until(lambda: not tier.writing.is_open)
    await write(tier, "a")
    assert not tier.writing.trouble
    await tier.close()


async def test_who_is_cancelled_leaves_after_the_thread(open_tier: OpenTier) -> None:
    """Else the arena's slot could be given away while the disk still reads from it."""
    begun, go_on = threading.Event(), threading.Event()

    def write_blocks(folder: Path, blocks: Sequence[SealedBlock]) -> WriteResult:
        begun.set()
        assert go_on.wait(10)
        return disk_files.write_blocks(folder, blocks)

    tier = await open_tier(write_blocks=write_blocks)
    task = asyncio.create_task(tier.write([sealed("a")]))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    await asyncio.sleep(0.05)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [path.name[:64] for path in files_in(tier.place)] == [names("a")[0].hex()]


async def test_directory_of_another_agent_is_refused(open_tier: OpenTier, tmp_path: Path) -> None:
    await open_tier()
    with pytest.raises(StartupError, match="in use by another agent"):
        await open_tier()
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StartupError, match=r"--kv-disk .*file"):
        await open_tier(file)
    loose = tmp_path / "loose"
    (loose / disk_files.FOLDER).mkdir(parents=True)
    (loose / disk_files.FOLDER).chmod(0o777)
    with pytest.raises(StartupError, match="mode 0700"):
        await open_tier(loose)

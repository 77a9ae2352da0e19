"""The tier in a directory: an index in memory, files that threads read and write, bounded in bytes."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from relevo.core.block_hash import BlockHash
from relevo.core.sizes import format_size
from services.kvtransfer.tiers import SealedBlock, TierCounters, disk_files
from services.kvtransfer.tiers.breaker import Breaker
from services.kvtransfer.tiers.disk_files import ReadResult, WriteResult, disk_bytes
from services.kvtransfer.tiers.threads import in_thread

logger = logging.getLogger(__name__)

WriteBlocks = Callable[[Path, Sequence[SealedBlock]], WriteResult]

_READ_THREADS = 2
_NAMES_AT_ONCE = 4096  # indexed or removed before others get their turn


class DiskTier:
    """directory: ours is one folder in it. max_bytes: of files, each rounded up to 4 KiB; least recently used go first.

    on_stored, on_removed: called with each name that can be found from now on, or no more. write_blocks: for tests.
    """

    name = "disk"

    def __init__(
        self,
        directory: Path,
        max_bytes: int,
        retry_seconds: float,
        on_stored: Callable[[BlockHash], None],
        on_removed: Callable[[BlockHash], None],
        write_blocks: WriteBlocks = disk_files.write_blocks,
    ) -> None:
        """Raises StartupError if the directory can't be used."""
        self.place = str(directory)
        self.max_bytes = max_bytes
        self.counters = TierCounters()
        self.reading = Breaker(f"reading from --kv-disk {directory}", retry_seconds)
        self.writing = Breaker(f"writing to --kv-disk {directory}", retry_seconds)
        self.num_bytes = 0
        self._folder, self._lock = disk_files.open_folder(directory)
        self._index: OrderedDict[BlockHash, int] = OrderedDict()  # → block_bytes; least recently used first
        self._on_stored = on_stored
        self._on_removed = on_removed
        self._write_blocks = write_blocks
        self._readers = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="kv-disk-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-disk-write")  # also removes: in order

    @property
    def num_blocks(self) -> int:
        return len(self._index)

    async def run(self) -> None:
        """Find what an earlier agent left. Meanwhile what is found already can be had."""
        loop = asyncio.get_running_loop()
        started, parts = loop.time(), disk_files.scan(self._folder)
        while (part := (await in_thread(self._readers, partial(next, parts, None)))[0]) is not None:
            for start in range(0, len(part), _NAMES_AT_ONCE):
                for name, block_bytes in part[start : start + _NAMES_AT_ONCE]:
                    self._add(name, block_bytes, is_recent=False)
                await asyncio.sleep(0)
        await self._make_room(0)
        if self._index:
            seconds = loop.time() - started
            size = format_size(self.num_bytes)
            logger.info("%s holds %d blocks (%s), found in %.2f s", self.place, self.num_blocks, size, seconds)

    async def holds(self, names: Sequence[BlockHash], block_bytes: int) -> set[BlockHash]:
        if self.reading.is_open:
            return set()
        found = {name for name in names if self._index.get(name) == block_bytes}
        for name in reversed(names):  # a prompt's last blocks become the least recently used
            if name in found:
                self._index.move_to_end(name)
        return found

    async def read(self, blocks: Sequence[tuple[BlockHash, memoryview]]) -> list[int | None]:
        if self.reading.is_open:
            return [None] * len(blocks)
        size = -(-len(blocks) // _READ_THREADS)
        parts = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        reads = [partial(disk_files.read_blocks, self._folder, part) for part in parts]
        results = await in_thread(self._readers, *reads)
        for part, result in zip(parts, results, strict=True):
            self._account_read(part, result)
        return [checksum for result in results for checksum in result.checksums]

    async def write(self, blocks: Sequence[SealedBlock]) -> list[BlockHash]:
        new = [block for block in blocks if block.name not in self._index]
        if not new:
            return []
        if sum(disk_bytes(len(block.block)) for block in new) > self.max_bytes:
            self.counters.dropped["too_large"] += len(new)
            return []
        await self._make_room(sum(disk_bytes(len(block.block)) for block in new))
        [result] = await in_thread(self._writer, partial(self._write_blocks, self._folder, new))
        sizes = {block.name: len(block.block) for block in new}
        for name in result.stored:
            self._add(name, sizes[name], is_recent=True)
        self.counters.stored += len(result.stored)
        if result.error is not None:
            self.counters.dropped["failed"] += len(new) - len(result.stored) - len(result.damaged)
            self.writing.trip(_explain(result.error))
        elif result.stored:
            self.writing.succeeded()
        return result.damaged

    async def list_blocks(self, limit: int) -> list[tuple[BlockHash, int]]:
        return list(islice(reversed(self._index.items()), limit))

    async def clear(self) -> int:
        num_blocks = len(self._index)
        while self._index:
            await self._remove_oldest(_NAMES_AT_ONCE)
        return num_blocks

    async def close(self) -> None:
        """Waits for what is being written now; a device that hangs is the watchdog's. Closing twice is harmless."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._writer.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._writer.shutdown, wait=True)
        self._lock.close()

    def _account_read(self, blocks: Sequence[tuple[BlockHash, memoryview]], result: ReadResult) -> None:
        for name in (*result.damaged, *result.gone):
            self._discard(name)
        num_good = sum(checksum is not None for checksum in result.checksums)
        self.counters.hits += num_good
        self.counters.damaged += len(result.damaged)
        if result.damaged:
            logger.warning(
                "%s: removed %d of %d files, damaged or not ours", self.place, len(result.damaged), len(blocks)
            )
        if result.error is not None:
            self.reading.trip(_explain(result.error))
        elif num_good:
            self.reading.succeeded()

    async def _make_room(self, num_bytes: int) -> None:
        while self._index and self.num_bytes + num_bytes > self.max_bytes:
            before = len(self._index)
            mean = max(1, self.num_bytes // before)
            await self._remove_oldest(min(_NAMES_AT_ONCE, -(-(self.num_bytes + num_bytes - self.max_bytes) // mean)))
            self.counters.evicted += before - len(self._index)

    async def _remove_oldest(self, count: int) -> None:
        oldest = list(islice(self._index.items(), count))
        for name, _ in oldest:
            self._discard(name)
        [failed] = await in_thread(self._writer, partial(_remove_all, self._folder, oldest))
        if failed is not None:
            self.writing.trip(f"cannot remove files: {_explain(failed)}")

    def _add(self, name: BlockHash, block_bytes: int, *, is_recent: bool) -> None:
        if name in self._index:
            return
        self._index[name] = block_bytes
        self._index.move_to_end(name, last=is_recent)
        self.num_bytes += disk_bytes(block_bytes)
        self._on_stored(name)

    def _discard(self, name: BlockHash) -> None:
        block_bytes = self._index.pop(name, None)
        if block_bytes is not None:
            self.num_bytes -= disk_bytes(block_bytes)
            self._on_removed(name)


def _remove_all(folder: Path, blocks: Sequence[tuple[BlockHash, int]]) -> OSError | None:
    failed = None
    for name, block_bytes in blocks:
        try:
            disk_files.remove(folder, name, block_bytes)
        except OSError as error:
            failed = error
    return failed


def _explain(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left: free some, or make --kv-disk-bytes smaller"
    return error.strerror or repr(error)

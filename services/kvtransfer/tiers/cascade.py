"""Between the arena and the tiers below it: sealed blocks are written behind, what is asked for is loaded."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import grpc

from relevo.core.block_hash import BlockHash
from services.kvtransfer.store import Store
from services.kvtransfer.tiers import SealedBlock, Tier

logger = logging.getLogger(__name__)

READ_SECONDS = 5.0  # a device that takes longer for some MiB hangs: whoever waits is told
_MAX_QUEUED = 8192  # names to be written, a tier; further ones are dropped, and counted
_BATCH_BYTES = 4 << 20  # read or written at once
_BATCH_BLOCKS = 64
_PAUSE_SECONDS = 2.0
_NOT_FOUND: int = grpc.StatusCode.NOT_FOUND.value[0]
_UNAVAILABLE: int = grpc.StatusCode.UNAVAILABLE.value[0]
_ABORTED: int = grpc.StatusCode.ABORTED.value[0]


class Tiers:
    """The tiers, fastest first. To the arena, a load is a writer like any other, and what writes behind is a reader.

    tiers: may be empty; everything is in vain then.
    """

    def __init__(self, store: Store, tiers: Sequence[Tier] = ()) -> None:
        self.tiers = tiers
        self._store = store
        self._queues = [_WriteQueue() for _ in tiers]
        self._loading: dict[BlockHash, int] = {}  # → which tier it comes from
        self._group: asyncio.TaskGroup | None = None
        self._num_at_work = 0  # loads and writes that hold slots
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = asyncio.Event()  # clear: paused
        self._running.set()

    async def run(self) -> None:
        """Write behind and load, until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            for tier, queue in zip(self.tiers, self._queues, strict=True):
                self._group.create_task(tier.run(), name=f"{tier.name} tier")
                self._group.create_task(self._write_behind(tier, queue), name=f"{tier.name} writes")

    def is_loading(self, name: BlockHash) -> bool:
        """It is granted, and a tier is its writer."""
        return name in self._loading

    def offer(self, name: BlockHash) -> None:
        """It was sealed: to be written to every tier, or to those above the one that it was loaded from."""
        stop = self._loading.get(name, len(self.tiers))
        for tier, queue in zip(self.tiers[:stop], self._queues[:stop], strict=True):
            if len(queue) < _MAX_QUEUED:
                queue.put(name)
            else:
                tier.counters.dropped["queue_full"] += 1

    async def load(self, names: Sequence[BlockHash]) -> None:
        """Begin to load what the arena lacks of these and a tier holds: it is granted when this returns.

        Only up to the first that is nowhere: without it, those after it are worth nothing. And only as many as fit
        without losing others of these names. What then can't be read is missing for those who wait for it.
        """
        if not self.tiers or self._group is None or not self._running.is_set():
            return
        places: dict[BlockHash, int] = {}
        for level, tier in enumerate(self.tiers):
            absent = [name for name in self._absent(names) if name not in places]
            if not absent:
                break
            places |= dict.fromkeys(await tier.holds(absent, self._store.arena.block_bytes), level)
        if not places or not self._running.is_set():
            return
        wanted = []
        for name in names:  # again: others came and went meanwhile
            if self._store.table.is_here(name):
                continue
            if name not in places:
                break
            wanted.append(name)
        wanted = wanted[: self._store.table.num_obtainable(names)]
        for level in sorted({places[name] for name in wanted}):
            self._start_load(level, [name for name in wanted if places[name] == level])

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Nothing is read into slots or written from them inside; a device that hangs does not keep this waiting."""
        self._running.clear()
        try:
            try:
                async with asyncio.timeout(_PAUSE_SECONDS):
                    await self._idle.wait()
            except TimeoutError:
                logger.warning("a tier does not let go of the arena")
            yield
        finally:
            self._running.set()

    def _absent(self, names: Sequence[BlockHash]) -> list[BlockHash]:
        return [name for name in names if not self._store.table.is_here(name)]

    # --- loading ---

    def _start_load(self, level: int, names: list[BlockHash]) -> None:
        assert self._group is not None
        lease_id, announcement = self._store.announce(names)
        self._begin_work()
        self._loading |= dict.fromkeys(names, level)
        granted = [(index, names[index], slot) for index, slot in announcement.granted.items()]
        task = self._group.create_task(self._load(self.tiers[level], lease_id, granted))
        task.add_done_callback(lambda _: self._end_load(lease_id, names))

    def _end_load(self, lease_id: int, names: Sequence[BlockHash]) -> None:
        self._store.end_lease(lease_id, _ABORTED)
        for name in names:
            self._loading.pop(name, None)
        self._end_work()

    async def _load(self, tier: Tier, lease_id: int, blocks: list[tuple[int, BlockHash, int]]) -> None:
        """blocks: (index in the lease, name, slot)"""
        loop = asyncio.get_running_loop()
        for part in _batches(blocks, self._store.arena.block_bytes):
            views = [(name, self._store.arena.block(slot)) for _, name, slot in part]
            timer = loop.call_later(READ_SECONDS, self._read_hangs, tier, [name for _, name, _ in blocks])
            try:
                checksums = await tier.read(views)
            finally:
                timer.cancel()
            for (index, _, _), checksum in zip(part, checksums, strict=True):
                if checksum is None:
                    self._store.abandon(lease_id, index, _NOT_FOUND)
                else:
                    self._store.seal(lease_id, index, checksum)

    def _read_hangs(self, tier: Tier, names: Sequence[BlockHash]) -> None:
        """Their slots stay granted: the device may still write to them."""
        tier.reading.trip(f"a read takes longer than {READ_SECONDS:g} s")
        for name in names:
            self._store.give_up(name, _UNAVAILABLE)

    # --- writing ---

    async def _write_behind(self, tier: Tier, queue: _WriteQueue) -> None:
        while True:
            await queue.wait()
            await self._running.wait()
            # Pinned while they are written: never so many that writers of new blocks are refused for it.
            limit = min(_batch_size(self._store.arena.block_bytes), self._store.table.num_slots // 16)
            names = queue.take(max(1, limit))
            if tier.writing.is_open or tier.reading.is_open:
                tier.counters.dropped["stopped"] += len(names)
            else:
                await self._write(tier, names)

    async def _write(self, tier: Tier, names: Sequence[BlockHash]) -> None:
        # A block that nobody else uses becomes a recently used one by this. What is evicted in its stead, too early, is
        # still to be had from below.
        table = self._store.table
        reader_id = table.open_reader()
        self._begin_work()
        try:
            blocks = []
            for name in names:
                if table.is_sealed(name):
                    pinned = table.pin(reader_id, name)
                    blocks.append(SealedBlock(name, pinned.checksum, self._store.arena.block(pinned.slot)))
                else:
                    tier.counters.dropped["evicted"] += 1
            for name in await tier.write(blocks):
                logger.warning("block %s does not match its checksum any more: dropped", name.hex())
                self._store.counters.corrupt_blocks += 1
                table.drop(reader_id, name)
        finally:
            table.close_reader(reader_id)
            self._end_work()

    def _begin_work(self) -> None:
        self._num_at_work += 1
        self._idle.clear()

    def _end_work(self) -> None:
        self._num_at_work -= 1
        if not self._num_at_work:
            self._idle.set()


class _WriteQueue:
    """Names to be written, each once, first come first served."""

    def __init__(self) -> None:
        self._names: OrderedDict[BlockHash, None] = OrderedDict()
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._names)

    def put(self, name: BlockHash) -> None:
        self._names[name] = None
        self._filled.set()

    async def wait(self) -> None:
        """Until there is something."""
        await self._filled.wait()

    def take(self, limit: int) -> list[BlockHash]:
        names = [self._names.popitem(last=False)[0] for _ in range(min(limit, len(self._names)))]
        if not self._names:
            self._filled.clear()
        return names


def _batches(
    blocks: Sequence[tuple[int, BlockHash, int]], block_bytes: int
) -> Iterator[Sequence[tuple[int, BlockHash, int]]]:
    size = _batch_size(block_bytes)
    for start in range(0, len(blocks), size):
        yield blocks[start : start + size]


def _batch_size(block_bytes: int) -> int:
    return max(1, min(_BATCH_BLOCKS, _BATCH_BYTES // block_bytes))

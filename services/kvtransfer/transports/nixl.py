"""Blocks by NIXL (extra relevo[nixl]): RDMA, shared memory, or whatever else its UCX finds between two hosts.

Reads are one-sided: the puller reads the source's arena without asking it, so what it reads is told right from wrong by
its checksum alone, and whoever has a link may read the whole arena. Where UCX must emulate that (over TCP), the source
has to lend a hand: a thread that looks every now and then while there are links. The puller has an agent of NIXL for
each link: destroying it is the one sure way to end transfers whose source has gone.

Imported when it is used: it needs a second, and libraries that not every machine has. Not through the package `nixl`,
which imports torch in order to find out about CUDA.
"""

from __future__ import annotations

import asyncio
import gc
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue

import numpy as np
import xxhash

from relevo.core.errors import Unavailable
from services.common.nixl import NixlReader, NotInstalled, load_nixl, make_agent
from services.kvtransfer.arena import Arena
from services.kvtransfer.transports import STALL_SECONDS, Figures, Outcome, WantedBlock
from services.kvtransfer.transports.work import PullWork
from services.pb import kvlink_pb2

__all__ = ["NixlDataServer", "NixlPuller", "NotInstalled", "load_nixl"]

PROBE_BYTES = 4 << 20
_BATCH_BYTES = 8 << 20  # in one transfer: checked while the next one is under way
_LOOK_SECONDS = 0.0005  # between the source's looks at what it might have to do
_NUM_PINGS = 8
_MAX_PROBES = 8
_PROBE_SECONDS = 0.05
_JOIN_SECONDS = STALL_SECONDS + 2.0


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).ctypes.data
    return address


def _regions(*views: memoryview) -> list[tuple[int, int]]:
    return [(_address(view), len(view)) for view in views]


class NixlDataServer:
    """Shows the arena to those who have a link. Raises NotInstalled, or whatever keeps NIXL from starting."""

    def __init__(self, arena: Arena, name: str) -> None:
        self._probe = memoryview(mmap.mmap(-1, PROBE_BYTES))
        self._agent = make_agent(name, _regions(arena.view, self._probe))
        self._offer = kvlink_pb2.TransportOffer(
            transport="nixl",
            metadata=self._agent.get_agent_metadata(),
            arena_base=_address(arena.view),
            probe_base=_address(self._probe),
        )
        self._links: set[bytes] = set()
        self._changed = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._look, name="data-nixl-server", daemon=True)
        self._thread.start()

    def offer(self) -> kvlink_pb2.TransportOffer:
        return self._offer

    def admit(self, link_id: bytes, secret: bytes) -> None:
        self._links.add(link_id)
        self._changed.set()

    def end_link(self, link_id: bytes) -> None:
        self._links.discard(link_id)

    async def close(self) -> None:
        self._is_closed = True
        self._changed.set()
        await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)
        self._agent = None  # while the memory that it has registered is still mapped
        gc.collect()

    def _look(self) -> None:
        while not self._is_closed:
            if not self._links:
                self._changed.wait()
                self._changed.clear()
                continue
            self._agent.update_notifs()
            time.sleep(_LOOK_SECONDS)


class NixlPuller:
    """One thread, and one agent of NIXL's, a link."""

    name = "nixl"

    def __init__(self, offer: kvlink_pb2.TransportOffer, arena: Arena, own_name: str) -> None:
        self._offer = offer
        self._arena = arena
        self._own_name = own_name
        self._scratch = memoryview(mmap.mmap(-1, PROBE_BYTES))
        self._reader: NixlReader | None = None  # in the thread only
        self._cut = threading.Event()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def probe(self) -> Figures:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Figures] = loop.create_future()

        def settle(figures: Figures | None, error: Exception | None) -> None:
            if future.done():
                return
            if figures is not None:
                future.set_result(figures)
            else:
                future.set_exception(Unavailable(f"NIXL: {error}"))

        def job() -> None:
            try:
                figures, error = self._connect_and_measure(), None
            except Exception as problem:  # NIXL's own classes, and ours
                figures, error = None, problem
            loop.call_soon_threadsafe(settle, figures, error)

        self._thread = threading.Thread(target=self._run, name="data-nixl", daemon=True)
        self._thread.start()
        self._jobs.put(job)
        return await future

    async def pull(self, token: bytes, blocks: Sequence[WantedBlock], answered: Callable[[int, Outcome], None]) -> None:
        if self._thread is None or self._cut.is_set():
            raise Unavailable("the NIXL link is closed")
        if blocks:
            work = PullWork(token, blocks, answered)
            self._jobs.put(partial(self._pull, work))
            await work.finish(self._cut.set)

    async def close(self) -> None:
        self._cut.set()
        if self._thread is not None:
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)

    # --- in the thread ---

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        self._destroy()

    def _connect_and_measure(self) -> Figures:
        self._reader = NixlReader(self._own_name, _regions(self._arena.view, self._scratch), self._offer.metadata)
        base = _address(self._scratch)
        pings = [self._time(lambda: self._read([(base, self._offer.probe_base, 8)])) for _ in range(_NUM_PINGS)]
        best, spent = 0.0, 0.0
        for _ in range(_MAX_PROBES):
            seconds = self._time(lambda: self._read([(base, self._offer.probe_base, PROBE_BYTES)]))
            best, spent = max(best, PROBE_BYTES / seconds), spent + seconds
            if spent > _PROBE_SECONDS:
                break
        return Figures(best, min(pings))

    def _time(self, do: Callable[[], None]) -> float:
        start = time.monotonic()
        do()
        return time.monotonic() - start

    def _pull(self, work: PullWork) -> None:
        if self._reader is None:
            work.fail(ConnectionError("the NIXL link is closed"))
            return
        if not work.begin():
            return
        try:
            size = max(1, _BATCH_BYTES // len(work.blocks[0].into))
            while batch := [index for _ in range(size) if (index := work.take()) is not None]:
                blocks = [work.blocks[index] for index in batch]
                self._read([(_address(block.into), self._source(block.slot), len(block.into)) for block in blocks])
                for index, block in zip(batch, blocks, strict=True):
                    right = xxhash.xxh3_64_intdigest(block.into) == block.checksum
                    work.answer(index, Outcome.ARRIVED if right else Outcome.CORRUPT)
        except Exception as error:  # NIXL's own classes, and ours
            self._cut.set()
            self._destroy()  # before anybody hears of it: from then on nothing writes into the blocks
            work.end(ConnectionError(f"NIXL: {error}"))
        else:
            work.end()

    def _source(self, slot: int) -> int:
        return int(self._offer.arena_base) + slot * self._arena.slot_bytes

    def _read(self, ranges: Sequence[tuple[int, int, int]]) -> None:
        assert self._reader is not None
        self._reader.read(ranges, STALL_SECONDS, self._cut.is_set)

    def _destroy(self) -> None:
        if self._reader is not None:
            self._reader.destroy()
            self._reader = None

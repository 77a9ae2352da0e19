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
import importlib
import logging
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import xxhash

from relevo.core.errors import Unavailable
from services.kvtransfer.arena import Arena
from services.kvtransfer.transports import STALL_SECONDS, Figures, Outcome, WantedBlock
from services.kvtransfer.transports.work import PullWork
from services.pb import kvlink_pb2

logger = logging.getLogger(__name__)

PROBE_BYTES = 4 << 20
_PACKAGES = ("nixl_cu13", "nixl_cu12")
_BATCH_BYTES = 8 << 20  # in one transfer: checked while the next one is under way
_LOOK_SECONDS = 0.0005  # between the source's looks at what it might have to do
_SPIN_SECONDS = 0.0003  # a transfer is waited for by looking, then by sleeping in between
_PAUSE_SECONDS = 0.00005
_NUM_PINGS = 8
_MAX_PROBES = 8
_PROBE_SECONDS = 0.05
_JOIN_SECONDS = STALL_SECONDS + 2.0


class NotInstalled(Exception):
    """Says what is missing."""


def load_nixl() -> Any:
    """NIXL's Python interface. Raises NotInstalled."""
    problems = []
    for package in _PACKAGES:
        try:
            module = importlib.import_module(f"{package}._api")
        except ImportError as error:
            problems.append(str(error))
            continue
        theirs = logging.getLogger("nixl")  # which it has configured to print on standard output
        theirs.handlers.clear()
        theirs.propagate = True
        theirs.setLevel(logging.WARNING)
        return module
    raise NotInstalled("; ".join(problems))


def _make_agent(name: str, memory: Sequence[memoryview]) -> Any:
    """With this memory registered. NIXL's exceptions are its own classes of C++: callers catch Exception."""
    nixl = load_nixl()
    config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    agent = nixl.nixl_agent(name, config)
    agent.register_memory([(_address(view), len(view), 0, "") for view in memory], "DRAM")
    return agent


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).ctypes.data
    return address


class NixlDataServer:
    """Shows the arena to those who have a link. Raises NotInstalled, or whatever keeps NIXL from starting."""

    def __init__(self, arena: Arena, name: str) -> None:
        self._probe = memoryview(mmap.mmap(-1, PROBE_BYTES))
        self._agent = _make_agent(name, [arena.view, self._probe])
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
        self._agent: Any = None  # in the thread only
        self._peer = ""
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
        self._agent = _make_agent(self._own_name, [self._arena.view, self._scratch])
        peer = self._agent.add_remote_agent(self._offer.metadata)
        self._peer = peer.decode() if isinstance(peer, bytes) else peer
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
        if self._agent is None:
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
        """(ours, theirs, bytes) each. Raises ConnectionError; then the agent must be destroyed."""
        agent = self._agent
        ours = agent.get_xfer_descs([(local, num_bytes, 0) for local, _, num_bytes in ranges], "DRAM")
        theirs = agent.get_xfer_descs([(remote, num_bytes, 0) for _, remote, num_bytes in ranges], "DRAM")
        handle = agent.initialize_xfer("READ", ours, theirs, self._peer)
        state, start = agent.transfer(handle), time.monotonic()
        while state == "PROC":
            waited = time.monotonic() - start
            if waited > STALL_SECONDS or self._cut.is_set():
                raise ConnectionError("cut off" if self._cut.is_set() else f"nothing came for {STALL_SECONDS:g} s")
            if waited > _SPIN_SECONDS:
                time.sleep(_PAUSE_SECONDS)
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise ConnectionError(f"the transfer ended with {state}")
        agent.release_xfer_handle(handle)

    def _destroy(self) -> None:
        self._agent = None
        gc.collect()  # transfers' handles refer to it, from the exception that is being handled, too

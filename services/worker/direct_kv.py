"""Blocks out of another worker's KV cache straight into ours, by NIXL: instead of the copy out of the arena, where they
are all the same (ADR 27).

A read asks nobody. What has arrived is the block that was wanted if its checksum says so, whoever had it and whatever
has become of him; else it is copied out of the arena.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from relevo.core.errors import StartupError
from relevo.engine.cache_memory import CacheMemory
from services.common.nixl import Memory, NixlReader, NotInstalled, load_nixl, make_agent
from services.kvtransfer.client import DirectPlace
from services.pb.kvtransfer_pb2 import DirectMemory
from services.worker.threads import run_to_its_end
from services.worker.transfers import Direction, Fallback, Transfers

logger = logging.getLogger(__name__)

READ_SECONDS = 1.0  # of a few blocks, which take milliseconds: what a peer that hangs costs a request
REST_SECONDS = 30.0  # before a peer that has failed is tried again
MAX_PEERS = 16  # connected at once; beyond, the one that was used longest ago goes
_LOOK_SECONDS = 0.0005  # between a shown cache's looks at what NIXL might have to do, while blocks may be read
_IDLE_SECONDS = 0.05  # and else
_BUSY_SECONDS = 10.0  # after the last request: as long as agents tell of its blocks

Spawn = Callable[[Coroutine[Any, Any, None], str], object]


@dataclass(frozen=True, slots=True)
class WantedBlock:
    """place: where it was. block_id: the reserved block of ours that it is for."""

    place: DirectPlace
    block_id: int
    checksum: int


class DirectKV:
    """One worker's: shows its cache, reads others'. Belongs to one loop.

    name: of this worker's NIXL agent, no other's
    spawn: runs a task. is_busy: whether requests are in progress; from a thread

    Raises StartupError where it cannot work.
    """

    def __init__(
        self, memory: CacheMemory, transfers: Transfers, name: str, spawn: Spawn, is_busy: Callable[[], bool]
    ) -> None:
        try:
            load_nixl()
            memory.check()
        except NotInstalled as error:
            raise StartupError(f"--direct-kv needs NIXL (pip install 'relevo[nixl]'): {error}") from error
        except Exception as error:  # Triton's, CUDA's
            raise StartupError(f"--direct-kv: {error}") from error
        self._memory = memory
        self._transfers = transfers
        self._name = name
        self._spawn = spawn
        self._is_busy = is_busy
        self._peers: OrderedDict[bytes, _Peer] = OrderedDict()  # by metadata, the one used last at the end
        self._shown: Any = None
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def show(self) -> DirectMemory:
        """From now on others may read the cache. Blocking: takes a second. Raises StartupError."""
        assert self._shown is None
        kind = _kind(self._memory)
        try:
            self._memory.enter_thread()
            self._shown = make_agent(self._name, [_region(self._memory)], kind)
            metadata = self._shown.get_agent_metadata()
        except Exception as error:  # NIXL's own classes
            raise StartupError(f"--direct-kv: NIXL does not take the KV cache, in {kind.kind}: {error}") from error
        self._thread = threading.Thread(target=self._look, name="direct-kv", daemon=True)
        self._thread.start()
        return DirectMemory(
            metadata=metadata, base=self._memory.address, kind=kind.kind, device=kind.device, worker=self._name
        )

    async def read(self, wanted: Mapping[int, WantedBlock], after: object) -> set[int]:
        """Fill reserved blocks; the keys of those that are right. When this returns, raises or is cancelled, nobody
        writes into the blocks any more, and that is bounded: at most STAGED_BLOCKS in READ_SECONDS.

        after: KVCache.last_launch() at any time since they were reserved
        """
        by_peer: dict[bytes, dict[int, WantedBlock]] = {}
        for key, block in wanted.items():
            by_peer.setdefault(block.place.memory.metadata, {})[key] = block
        came: set[int] = set()
        for part in by_peer.values():
            peer = self._peer(next(iter(part.values())).place.memory)
            blocks = list(part.values())
            if peer.is_connected:
                right = await run_to_its_end(peer.executor, partial(peer.read, blocks, after))
            else:
                right = [False] * len(blocks)
                self._transfers.fell_back(Fallback.APART, len(blocks))
            came.update(key for key, is_right in zip(part, right, strict=True) if is_right)
        return came

    async def close(self) -> None:
        self._is_closed.set()
        while self._peers:
            await self._peers.popitem()[1].close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._shown = None
        gc.collect()

    def _peer(self, memory: DirectMemory) -> _Peer:
        """Connected, or tried to, in the background: the blocks at hand are not kept waiting for a second."""
        peer = self._peers.get(memory.metadata)
        if peer is None:
            peer = self._peers[memory.metadata] = _Peer(self._memory, memory, self._transfers)
            if len(self._peers) > MAX_PEERS:
                self._spawn(self._peers.popitem(last=False)[1].close(), "direct KV: close")
        self._peers.move_to_end(memory.metadata)
        if peer.is_to_connect():
            self._spawn(run_to_its_end(peer.executor, peer.connect), "direct KV: connect")
        return peer

    def _look(self) -> None:
        """NIXL has no thread of its own that sleeps, and where UCX must emulate reads the source lends a hand."""
        self._memory.enter_thread()
        busy_until = 0.0
        while not self._is_closed.is_set():
            now = time.monotonic()
            if self._is_busy():
                busy_until = now + _BUSY_SECONDS
            self._shown.update_notifs()
            time.sleep(_LOOK_SECONDS if now < busy_until else _IDLE_SECONDS)


class _Peer:
    """Another worker's cache. Its own thread, its own NIXL agent: one peer that hangs holds up nobody else."""

    def __init__(self, ours: CacheMemory, theirs: DirectMemory, transfers: Transfers) -> None:
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="direct-kv")
        self._ours = ours
        self._theirs = theirs
        self._transfers = transfers
        self._reader: NixlReader | None = None  # made and ended in the thread
        self._is_connecting = False
        self._rests_until = 0.0
        self._has_failed = False

    @property
    def is_connected(self) -> bool:
        return self._reader is not None

    def is_to_connect(self) -> bool:
        """True once: then connect must be called, in the thread."""
        if self._reader is not None or self._is_connecting or time.monotonic() < self._rests_until:
            return False
        self._is_connecting = True
        return True

    async def close(self) -> None:
        """When the reads that were begun have ended."""
        await run_to_its_end(self.executor, self._disconnect)
        self.executor.shutdown(wait=False)

    # --- in the thread ---

    def connect(self) -> None:
        try:
            self._ours.enter_thread()
            theirs = Memory(self._theirs.kind, self._theirs.device)
            name, region = f"reader-{uuid4()}", _region(self._ours)
            self._reader = NixlReader(name, [region], self._theirs.metadata, _kind(self._ours), theirs)
        except Exception as error:  # NIXL's own classes
            self._lose(error)
        finally:
            self._is_connecting = False

    def read(self, blocks: Sequence[WantedBlock], after: object) -> list[bool]:
        """False for each that is not what was wanted. Whatever happens, the place is nobody else's afterwards."""
        started = time.monotonic()
        block_ids = [block.block_id for block in blocks]
        size = self._ours.block_bytes
        if self._reader is None:  # lost by the read before this one
            return self._fell_back(Fallback.APART, blocks)
        try:
            places = zip(self._ours.addresses(block_ids, after), blocks, strict=True)
            ranges = [(into, self._theirs.base + block.place.block_id * size, size) for into, block in places]
            self._reader.read(ranges, READ_SECONDS, lambda: False)
            found = self._ours.checksums(block_ids)
        except Exception as error:  # a transfer that failed, or CUDA
            self._lose(error)
            return self._fell_back(Fallback.FAILED, blocks)
        right = [checksum == block.checksum for checksum, block in zip(found, blocks, strict=True)]
        num_right = sum(right)
        self._transfers.copied(Direction.DIRECT, num_right, num_right * size, time.monotonic() - started)
        if num_right < len(blocks):
            self._transfers.fell_back(Fallback.CHANGED, len(blocks) - num_right)
        return right

    def _fell_back(self, reason: Fallback, blocks: Sequence[WantedBlock]) -> list[bool]:
        self._transfers.fell_back(reason, len(blocks))
        return [False] * len(blocks)

    def _lose(self, error: Exception) -> None:
        logger.log(
            logging.DEBUG if self._has_failed else logging.WARNING,
            "KV blocks do not come directly from %s (%s): they are copied out of the arena",
            self._theirs.worker,
            error,
        )
        self._has_failed = True
        self._rests_until = time.monotonic() + REST_SECONDS
        self._disconnect()

    def _disconnect(self) -> None:
        """Nothing of what was being read arrives any more when this returns."""
        if self._reader is not None:
            self._reader.destroy()
            self._reader = None
            self._ours.settle()


def _region(memory: CacheMemory) -> tuple[int, int]:
    return memory.address, memory.num_blocks * memory.block_bytes


def _kind(memory: CacheMemory) -> Memory:
    return Memory() if memory.device is None else Memory("VRAM", memory.device)

"""Copies between the engine's blocks and the agent's arena, in threads, never outliving who asked for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from relevo.engine.gpu.block_streams import STAGED_BLOCKS
from services.kvtransfer.client import read_blocks, write_blocks
from services.worker.ports import KVCachePort
from services.worker.threads import run_to_its_end
from services.worker.transfers import Direction, Transfers

T = TypeVar("T")

BLOCKS_PER_COPY = STAGED_BLOCKS  # in one call: also what a cancelled request still waits for


class Copier:
    """A few threads that copy blocks. Copies and checksums release the GIL: steps and the loop go on meanwhile."""

    def __init__(self, num_threads: int = 2) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="copier")

    async def run(self, copy: Callable[[], T]) -> T:
        """In a thread; see run_to_its_end."""
        return await run_to_its_end(self._executor, copy)

    def close(self) -> None:
        self._executor.shutdown(wait=True)


def copy_in(
    kv_cache: KVCachePort,
    transfers: Transfers,
    block_ids: Sequence[int],
    slots: Sequence[memoryview],
    checksums: Sequence[int],
    after: object,
) -> list[bool]:
    """Out of slots of the arena into reserved blocks; False for each that is not what its writer sealed. Blocking.

    after: kv_cache.last_launch() at any time since they were reserved
    """
    started = time.monotonic()
    found = kv_cache.receive(block_ids, slots, after)
    if found is not None:
        good = [checksum == right for checksum, right in zip(found, checksums, strict=True)]
    else:
        with kv_cache.arriving(block_ids, after) as places:
            good = read_blocks(slots, places, checksums)
    transfers.copied(Direction.IN, len(slots), sum(map(len, slots)), time.monotonic() - started)
    return good


def copy_out(
    kv_cache: KVCachePort,
    transfers: Transfers,
    direction: Direction,
    block_ids: Sequence[int],
    slots: Sequence[memoryview],
) -> list[int]:
    """Blocks that are held into granted slots; the checksums to seal them with. Blocking."""
    started = time.monotonic()
    checksums = kv_cache.send(block_ids, slots)
    if checksums is None:
        with kv_cache.leaving(block_ids) as sources:
            checksums = write_blocks(slots, sources)
    transfers.copied(direction, len(slots), sum(map(len, slots)), time.monotonic() - started)
    return checksums

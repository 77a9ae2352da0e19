"""A prompt's blocks out of the engine's pool into granted slots of the arena, sealed as they are computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from relevo.core.block_hash import BlockHash
from services.kvtransfer.client import KvAgentClient, Publication, write_block
from services.worker.copying import BLOCKS_PER_COPY, Copier
from services.worker.ports import KVCachePort

LEASE_SECONDS = 15.0  # how long a prefill worker that hangs keeps slots from others
KEEP_ALIVE_SECONDS = LEASE_SECONDS / 3


@asynccontextmanager
async def open_handover(
    agent: KvAgentClient, kv_cache: KVCachePort, copier: Copier, names: Sequence[BlockHash], first: int
) -> AsyncIterator[Handover]:
    """Announce names[first:]. Leaving gives up what is not sealed. Raises Exhausted, Unavailable, Mismatch."""
    if first == len(names):
        yield Handover(None, agent.address, kv_cache, copier, first)
        return
    async with agent.publish(names[first:], lease_ms=int(LEASE_SECONDS * 1000)) as publication:
        yield Handover(publication, publication.mapping.agent_address, kv_cache, copier, first)


class Handover:
    """One prompt's publication.

    [0, first)          decode has them: not published
    [first, num_done)   sealed, or another writer's
    [num_done, …)       to be copied when they are computed

    publication: None when there is nothing to publish.
    """

    def __init__(
        self, publication: Publication | None, agent_address: str, kv_cache: KVCachePort, copier: Copier, first: int
    ) -> None:
        self.agent_address = agent_address
        self._publication = publication
        self._kv_cache = kv_cache
        self._copier = copier
        self._first = first
        self._num_done = first
        self._is_stopped = asyncio.Event()
        self.num_present_blocks = self._count_present()

    def _count_present(self) -> int:
        """Leading blocks of the prompt that need no computing: of them, the agent holds those that decode lacks."""
        if self._publication is None:
            return 0
        num_present = 0
        while num_present in self._publication.present:
            num_present += 1
        return self._first + num_present if num_present else 0

    async def hand_over(self, num_blocks: int, block_ids: Sequence[int]) -> None:
        """Copy and seal those of the first num_blocks, all computed, that are ours to write and not sealed yet.

        block_ids: of the prompt, from its first block on; held until this returns or has been cancelled.
        """
        publication = self._publication
        if publication is None:
            return
        last = min(num_blocks, len(block_ids))
        todo = [
            (index - self._first, block_ids[index])
            for index in range(self._num_done, last)
            if index - self._first in publication.granted
        ]
        self._num_done = max(self._num_done, last)
        for start in range(0, len(todo), BLOCKS_PER_COPY):
            part = todo[start : start + BLOCKS_PER_COPY]
            checksums = await self._copier.run(partial(self._copy, publication, part))
            await publication.seal([(index, checksum) for (index, _), checksum in zip(part, checksums, strict=True)])

    async def keep_alive(self) -> None:
        """Runs beside the computing: a request that waits must not lose its slots. Raises if the agent is gone.

        Ends with stop(), not by being cancelled: an exchange with the agent that is cut short would spoil the next.
        """
        while self._publication is not None and not self._is_stopped.is_set():
            try:
                async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                    await self._is_stopped.wait()
            except TimeoutError:
                await self._publication.seal([])

    def stop(self) -> None:
        self._is_stopped.set()

    def _copy(self, publication: Publication, blocks: Sequence[tuple[int, int]]) -> list[int]:
        """In a thread. Returns the checksums, made from the engine's own bytes."""
        return [
            write_block(publication.slot(index), self._kv_cache.checksum_view(block_id)) for index, block_id in blocks
        ]

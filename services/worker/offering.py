"""Blocks that a decode worker has computed, offered to the agent, where the next turn finds them, on any worker.

What is offered are names: those that steps stored in the pool. So it does not matter whose they are, or whether the
request has ended or was preempted meanwhile; a block that is no longer in the pool when its turn comes is not offered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from relevo.core.block_hash import BlockHash
from relevo.core.errors import RelevoError
from services.kvtransfer.client import KvAgentClient, Publication
from services.worker.copying import BLOCKS_PER_COPY, copy_out
from services.worker.transfers import Direction
from services.worker.worker import Worker

logger = logging.getLogger(__name__)

MAX_QUEUED = 4096  # names; the newest are dropped beyond: without those before them they would be worth nothing
COLLECT_SECONDS = 0.05  # names of this long go to the agent together
RETRY_SECONDS = 5.0  # after the agent has failed


class Offering:
    """Takes names from steps; one task, while there are any, brings their blocks to the agent.

    share: of the time, at most so much goes into it; the rest is waited for between two parts.
    """

    def __init__(self, agent: KvAgentClient, worker: Worker, share: float) -> None:
        self.num_dropped = 0  # names for which there was no room in the queue
        self._agent = agent
        self._worker = worker
        self._share = share
        self._queue: OrderedDict[BlockHash, None] = OrderedDict()
        self._task: asyncio.Task[None] | None = None
        self._has_failed = False

    @property
    def is_idle(self) -> bool:
        """Nothing is offered, or waits for its turn."""
        return self._task is None and not self._queue

    def stored(self, names: Sequence[BlockHash]) -> None:
        """A step has put these into the pool."""
        for name in names:
            if len(self._queue) < MAX_QUEUED:
                self._queue[name] = None
            else:
                self.num_dropped += 1
        if self._queue and self._task is None:
            self._task = self._worker.spawn(self._run(), "offering")
            self._task.add_done_callback(self._done)

    async def _run(self) -> None:
        await asyncio.sleep(COLLECT_SECONDS)
        while self._queue:
            names = [self._queue.popitem(last=False)[0] for _ in range(min(BLOCKS_PER_COPY, len(self._queue)))]
            started = time.monotonic()
            try:
                await self._offer(names)
                self._has_failed = False
            except RelevoError as error:
                level = logging.DEBUG if self._has_failed else logging.WARNING
                logger.log(level, "the KV agent takes no blocks (%s): they are kept here alone", error.message)
                self._has_failed = True
                self._queue.clear()
                await asyncio.sleep(RETRY_SECONDS)
            seconds = time.monotonic() - started
            await asyncio.sleep(max(COLLECT_SECONDS, seconds * (1 / self._share - 1)))

    async def _offer(self, names: Sequence[BlockHash]) -> None:
        lease_ms = int(self._worker.settings.lease_seconds * 1000)
        async with self._agent.publish(names, lease_ms=lease_ms, is_offer=True) as publication:
            wanted = [names[index] for index in publication.granted]
            if not wanted:
                return
            pinned = await self._worker.thread.pin(wanted)
            try:
                indices = [index for index in publication.granted if names[index] in pinned]
                block_ids = [pinned[names[index]] for index in indices]
                checksums = await self._worker.copier.run(partial(self._copy, publication, indices, block_ids))
            finally:
                self._worker.thread.unpin(list(pinned.values()))
            await publication.seal(zip(indices, checksums, strict=True))

    def _copy(self, publication: Publication, indices: Sequence[int], block_ids: Sequence[int]) -> list[int]:
        """In a thread. Returns the checksums of what was stored."""
        slots = [publication.slot(index) for index in indices]
        return copy_out(self._worker.engine.kv_cache, self._worker.transfers, Direction.OFFER, block_ids, slots)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if self._queue and not task.cancelled() and task.exception() is None:
            self.stored(())

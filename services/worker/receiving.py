"""Blocks out of the host's arena into blocks that the engine has reserved."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from relevo.core.block_hash import BlockHash
from relevo.core.errors import RelevoError
from services.kvtransfer.client import BlockFetch, DirectPlace, KvAgentClient
from services.worker.copying import BLOCKS_PER_COPY, copy_in
from services.worker.direct_kv import WantedBlock
from services.worker.worker import Worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrived:
    """A pinned block. slot: its bytes in the arena. place: where its writer has it, or had."""

    index: int
    slot: memoryview
    checksum: int
    place: DirectPlace | None


class BlockReceiver:
    """What a worker needs to take blocks in: its agent, its cache, and threads to copy in."""

    def __init__(self, agent: KvAgentClient, worker: Worker) -> None:
        self.agent = agent
        self.kv_cache = worker.engine.kv_cache
        self.copier = worker.copier
        self.transfers = worker.transfers
        self.direct_kv = worker.direct_kv
        self.timeout_seconds = worker.settings.handover_timeout_seconds

    def receive(self, names: Sequence[BlockHash], block_ids: Sequence[int], source_address: str) -> Receiving:
        """Take blocks, announced at source_address ("": our own agent), into these reserved places. See Receiving."""
        return Receiving(self, names, block_ids, source_address)


class Receiving:
    """One prompt's blocks on their way in. Only the leading ones without a gap are of use.

    [0, num_contiguous)      arrived, and their checksums are right
    [num_contiguous, limit)  on the way, or arrived after a gap
    [limit, …)               of no use: `limit` is the first that will not come
    """

    def __init__(
        self, receiver: BlockReceiver, names: Sequence[BlockHash], block_ids: Sequence[int], source_address: str
    ) -> None:
        self.num_contiguous = 0
        self.began_at = self.last_arrival = time.monotonic()
        self.transport = ""  # over which they came
        self._receiver = receiver
        self._after = receiver.kv_cache.last_launch()
        self._names = names
        self._block_ids = block_ids
        self._source_address = source_address
        self._arrived: set[int] = set()
        self._limit = len(names)
        self._num_direct = 0

    async def run(self) -> None:
        """Until no more is to come. When this returns, or is cancelled, nobody writes into the blocks any more.

        An agent that fails is logged, not raised: what has arrived is good, and the rest is computed.
        """
        receiver = self._receiver
        try:
            async with receiver.agent.fetch(
                self._names,
                self._source_address,
                timeout_seconds=receiver.timeout_seconds,
                direct=receiver.direct_kv is not None,
            ) as fetch:
                async for batch in fetch:
                    self._limit = min([self._limit, *(block.index for block in batch.missing)])
                    arrived = [
                        Arrived(block.index, fetch.slot(block), block.checksum, block.place) for block in batch.arrived
                    ]
                    for start in range(0, len(arrived), BLOCKS_PER_COPY):
                        await self._take(fetch, arrived[start : start + BLOCKS_PER_COPY])
                    if self.num_contiguous >= self._limit:
                        break
                receiver.transfers.came_over_link(fetch.link_bytes_per_second)
                self.transport = "direct" if self._num_direct == len(self._arrived) > 0 else fetch.transport
        except RelevoError as error:
            self._limit = self.num_contiguous
            logger.warning("KV blocks did not come (%s): they are computed here", error.message)
        if self._limit < len(self._names):
            logger.debug("%d of %d blocks received", self.num_contiguous, len(self._names))

    async def _take(self, fetch: BlockFetch, blocks: Sequence[Arrived]) -> None:
        useful = [block for block in blocks if block.index < self._limit]
        came = await self._read_directly(useful)
        self._num_direct += len(came)
        rest = [block for block in useful if block.index not in came]
        corrupt = await self._receiver.copier.run(partial(self._copy, rest)) if rest else []
        if corrupt:
            logger.warning("%d KV blocks do not match their checksums: they are computed here", len(corrupt))
        self._limit = min([self._limit, *corrupt])
        self._arrived.update(block.index for block in useful)
        while self.num_contiguous < self._limit and self.num_contiguous in self._arrived:
            self.num_contiguous += 1
        self.last_arrival = time.monotonic()
        good = [block.index for block in blocks if block.index not in corrupt]
        await fetch.release(good, corrupt=corrupt)

    async def _read_directly(self, blocks: Sequence[Arrived]) -> set[int]:
        """The indices of those that have come so. As for the others, nobody writes into their places any more."""
        if self._receiver.direct_kv is None:
            return set()
        wanted = {
            block.index: WantedBlock(block.place, self._block_ids[block.index], block.checksum)
            for block in blocks
            if block.place is not None
        }
        return await self._receiver.direct_kv.read(wanted, self._after)

    def _copy(self, blocks: Sequence[Arrived]) -> list[int]:
        """In a thread. Returns the corrupt ones; what is checked is the copy that the engine will use."""
        receiver = self._receiver
        block_ids = [self._block_ids[block.index] for block in blocks]
        slots, checksums = [block.slot for block in blocks], [block.checksum for block in blocks]
        good = copy_in(receiver.kv_cache, receiver.transfers, block_ids, slots, checksums, self._after)
        return [block.index for block, is_good in zip(blocks, good, strict=True) if not is_good]

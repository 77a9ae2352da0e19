"""A prompt's blocks out of the engine's pool into granted slots of the arena, sealed as they are computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from relevo.core.block_hash import BlockHash
from services.kvtransfer.client import KvAgentClient, Publication
from services.worker.copying import BLOCKS_PER_COPY, Copier, copy_out
from services.worker.ports import KVCachePort
from services.worker.transfers import Direction, Transfers


@dataclass(frozen=True)
class HandoverPorts:
    """What a prefill worker hands blocks over with. lease_seconds: how long one that hangs keeps slots from others."""

    agent: KvAgentClient
    kv_cache: KVCachePort
    copier: Copier
    transfers: Transfers
    lease_seconds: float


@dataclass(frozen=True)
class Source:
    """An agent, this host's or another's, which holds the leading num_blocks of a prompt."""

    agent_address: str
    num_blocks: int


NO_SOURCE = Source("", 0)


@asynccontextmanager
async def open_handover(
    ports: HandoverPorts, names: Sequence[BlockHash], first: int, source: Source = NO_SOURCE
) -> AsyncIterator[Handover]:
    """Announce names[first:]. Leaving gives up what is not sealed. Raises Exhausted, Unavailable, Mismatch."""
    async with AsyncExitStack() as stack:
        handover = Handover(ports, names, first, stack)
        handover.num_present_blocks = min(first, source.num_blocks)
        if first < len(names):
            publication = await handover.announce(range(first, len(names)), source)
            num_present = 0
            while num_present in publication.present:
                num_present += 1
            if num_present:
                handover.num_present_blocks = first + num_present
                handover.is_loading = any(index not in publication.sealed for index in range(num_present))
        yield handover


class Handover:
    """One prompt's publication. Indices count the prompt's blocks.

    [0, first)          decode has them: not published
    [first, num_done)   sealed, or another writer's
    [num_done, …)       to be copied when they are computed

    num_present_blocks: leading ones that should need no computing here: an agent has them
    is_loading: some of those that decode lacks are still on their way to our agent
    """

    def __init__(self, ports: HandoverPorts, names: Sequence[BlockHash], first: int, stack: AsyncExitStack) -> None:
        self.agent_address = ports.agent.address
        self.num_present_blocks = 0
        self.is_loading = False
        self._ports = ports
        self._names = names
        self._first = first
        self._num_done = first
        self._stack = stack
        self._publications: list[Publication] = []
        self._grants: dict[int, tuple[Publication, int]] = {}  # → where it is to be sealed, and its index there
        self._is_stopped = asyncio.Event()

    async def announce(self, indices: Sequence[int], source: Source = NO_SOURCE) -> Publication:
        """Say that these will be written, those that nobody else has or writes."""
        publication = await self._stack.enter_async_context(
            self._ports.agent.publish(
                [self._names[index] for index in indices],
                lease_ms=int(self._ports.lease_seconds * 1000),
                source_agent_address=source.agent_address,
                num_blocks_at_source=max(0, source.num_blocks - self._first),
            )
        )
        self.agent_address = publication.mapping.agent_address
        self._publications.append(publication)
        self._grants |= {indices[index]: (publication, index) for index in publication.granted}
        return publication

    async def claim(self, first: int) -> None:
        """Present blocks from `first` on did not come: they are computed here, and ours to write if nobody's."""
        lost = [index for index in range(max(first, self._first), self.num_present_blocks) if index not in self._grants]
        if lost:
            await self.announce(lost)

    async def hand_over(self, num_blocks: int, block_ids: Sequence[int]) -> int:
        """Copy and seal those of the first num_blocks, all computed, that are ours to write and not sealed yet.

        block_ids: of the prompt, from its first block on; held until this returns or has been cancelled. Returns how
        many were sealed.
        """
        last = min(num_blocks, len(block_ids))
        todo = [index for index in range(self._num_done, last) if index in self._grants]
        self._num_done = max(self._num_done, last)
        for start in range(0, len(todo), BLOCKS_PER_COPY):
            part = todo[start : start + BLOCKS_PER_COPY]
            checksums = await self._ports.copier.run(partial(self._copy, part, block_ids))
            for publication in self._publications:
                ours = [
                    (self._grants[index][1], checksum, block_ids[index])
                    for index, checksum in zip(part, checksums, strict=True)
                    if self._grants[index][0] is publication
                ]
                if ours:
                    places = {index: block_id for index, _, block_id in ours}
                    await publication.seal([(index, checksum) for index, checksum, _ in ours], places)
        return len(todo)

    async def keep_alive(self) -> None:
        """Runs beside the computing: a request that waits must not lose its slots. Raises if the agent is gone.

        Ends with stop(), not by being cancelled: an exchange with the agent that is cut short would spoil the next.
        """
        while not self._is_stopped.is_set():
            try:
                async with asyncio.timeout(self._ports.lease_seconds / 3):
                    await self._is_stopped.wait()
            except TimeoutError:
                for publication in self._publications:
                    await publication.seal([])

    def stop(self) -> None:
        self._is_stopped.set()

    def _copy(self, indices: Sequence[int], block_ids: Sequence[int]) -> list[int]:
        """In a thread. Returns the checksums of what was stored."""
        ports = self._ports
        slots = [publication.slot(index) for publication, index in (self._grants[each] for each in indices)]
        return copy_out(ports.kv_cache, ports.transfers, Direction.OUT, [block_ids[index] for index in indices], slots)

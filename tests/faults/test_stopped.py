"""Prefill, in the middle of a copy, and agent stand still (SIGSTOP) for longer than the leases. Then they go on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from services.kvtransfer.client import KvAgentClient, read_block, write_block
from tests.faults.disturb import Fault
from tests.faults.stack import (
    GREEDY,
    PAGES_PER_BLOCK,
    PROMPT,
    SETTINGS,
    Clients,
    flags,
    router,
    start_agent,
    until_unused,
)
from tests.faults.zygote import Forked, Zygote
from tests.support.agents import until
from tests.support.parity import transformers_greedy
from tests.support.real_workers import RealWorker, real_worker

LEASE_SECONDS = 0.4
NUM_SLOTS = 8  # few, so that another writer who takes all that are free gets those of the old one
STOPPED_IN = Fault("copying", chunk=3, blow="SIGSTOP")
# The agent knows of an end of the lease before prefill does, or prefill seals before the agent looks at its clock.
Order = Literal["agent", "prefill"]


@dataclass
class Whole:
    agent: Forked
    prefill: Forked
    decode: RealWorker
    clients: Clients

    async def stop_both(self) -> None:
        """Prefill does so by itself. Returns when the leases are over."""
        await until(lambda: self.prefill.is_stopped)
        self.agent.send(signal.SIGSTOP)
        await until(lambda: self.agent.is_stopped)
        await asyncio.sleep(3 * LEASE_SECONDS)  # it is time itself that is waited for


@pytest.fixture
async def whole(zygote: Zygote, model: Path, tmp_path: Path) -> AsyncIterator[Whole]:
    """At the end nothing may be held anywhere."""
    agent = await start_agent(zygote, tmp_path, num_pages=NUM_SLOTS * PAGES_PER_BLOCK)
    prefill: Forked | None = None
    found: Any = SimpleNamespace(address=agent.address)
    try:
        more = (*flags(model, agent.address), f"--lease-seconds={LEASE_SECONDS}")
        prefill = await asyncio.to_thread(zygote.start, "prefill", *more, fault=STOPPED_IN)
        async with (
            real_worker(model, "decode", found, offer_share=0.0, **SETTINGS) as decode,
            router([decode.address], [prefill.address]) as clients,
        ):
            yield Whole(agent, prefill, decode, clients)
            await clients.until_whole()
            await until_unused(agent.address)
    finally:
        for process in (prefill, agent):
            if process is not None:
                await asyncio.to_thread(process.end)


@pytest.mark.parametrize("first", ["agent", "prefill"])
async def test_both_stopped_for_longer_than_the_leases(whole: Whole, model: Path, first: Order) -> None:
    asking = asyncio.create_task(whole.clients.generate(PROMPT, GREEDY))
    await whole.stop_both()
    for process in (whole.agent, whole.prefill) if first == "agent" else (whole.prefill, whole.agent):
        process.send(signal.SIGCONT)
    assert (await asking).token_ids == transformers_greedy(model)[3]
    assert (await whole.clients.generate(PROMPT, GREEDY, salt="next")).token_ids == transformers_greedy(model)[3]


async def test_old_writers_slot_belongs_to_another_when_it_goes_on(whole: Whole, model: Path) -> None:
    """Its seal is refused, and who reads the other's blocks gets them as they were sealed, or not at all."""
    asking = asyncio.create_task(whole.clients.generate(PROMPT, GREEDY))
    await whole.stop_both()
    whole.agent.send(signal.SIGCONT)
    async with other_writer(whole) as other:
        found = await other.until_lease_is_over()
        assert found.num_slots == NUM_SLOTS
        num_free = found.num_free
        names = await other.publish(num_free)
        assert await other.num_readable(names) == num_free
        whole.prefill.send(signal.SIGCONT)
        assert (await asking).token_ids == transformers_greedy(model)[3]
        await whole.clients.until_whole()
        # The slots that it wrote into, one or several at a time, are among these: nobody gets what they hold.
        num_good = await other.num_readable(names)
        assert num_good < num_free
        assert await other.num_readable(names) == num_good
    assert (await whole.clients.generate(PROMPT, GREEDY, salt="next")).token_ids == transformers_greedy(model)[3]


@dataclass
class OtherWriter:
    client: KvAgentClient
    block_bytes: int

    async def until_lease_is_over(self) -> Any:
        async with asyncio.timeout(10):
            while (found := await self.client.audit()).num_leases:  # noqa: ASYNC110  # there is no event for it
                await asyncio.sleep(0.01)
        return found

    async def publish(self, num_blocks: int) -> list[bytes]:
        names = [os.urandom(32) for _ in range(num_blocks)]
        async with self.client.publish(names) as publication:
            assert len(publication.granted) == num_blocks
            sums = [(i, write_block(publication.slot(i), self._block(names[i]))) for i in range(num_blocks)]
            await publication.seal(sums)
        return names

    async def num_readable(self, names: list[bytes]) -> int:
        """Of these blocks; each that can be read is right."""
        num_good = 0
        async with self.client.fetch(names, timeout_seconds=5) as fetch:
            async for batch in fetch:
                for block in batch.arrived:
                    into = np.empty(self.block_bytes, np.uint8)
                    good = read_block(fetch.slot(block), into, block.checksum)
                    assert not good or np.array_equal(into, self._block(names[block.index]))
                    await fetch.release([block.index] if good else [], corrupt=[] if good else [block.index])
                    num_good += good
        return num_good

    def _block(self, name: bytes) -> Any:
        return np.random.default_rng(list(name)).integers(0, 256, self.block_bytes, np.uint8)


@asynccontextmanager
async def other_writer(whole: Whole) -> AsyncIterator[OtherWriter]:
    info = whole.decode.engine.info
    client = KvAgentClient(whole.agent.address, "other", "incarnation")
    try:
        await client.attach(info.fingerprint, info.block_bytes)
        yield OtherWriter(client, info.block_bytes)
    finally:
        await client.close()

"""Blocks with known bytes, and what every test does with them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from urllib.request import urlopen

import xxhash

from services.kvtransfer.agent import Agent
from services.kvtransfer.block_fetch import BlockFetch
from services.kvtransfer.client import KvAgentClient, Publication, read_block, write_block
from services.kvtransfer.tiers import SealedBlock

BLOCK_BYTES = 5000  # not a page's multiple: a slot has two pages
FINGERPRINT = b"f" * 32
NUM_SLOTS = 8
ARENA_BYTES = NUM_SLOTS * 8192


def block_name(label: object) -> bytes:
    return hashlib.sha256(repr(label).encode()).digest()


def names(*labels: object) -> list[bytes]:
    return [block_name(label) for label in labels]


def block_data(label: object) -> bytes:
    """A block's bytes, different for each label."""
    return hashlib.shake_128(repr(label).encode()).digest(BLOCK_BYTES)


def sealed(label: object) -> SealedBlock:
    """A block as a tier gets it to write."""
    data = memoryview(block_data(label))
    return SealedBlock(block_name(label), xxhash.xxh3_64_intdigest(data), data)


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for what will soon be so. Fails if it does not come."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # the agent has no event for it: it is looked at from outside
            await asyncio.sleep(0.005)


async def until_unused(agent: Agent) -> None:
    """Wait until nothing is granted, pinned, leased or open at the agent; the audit must add up all the while."""

    def unused() -> bool:
        agent.store.check()
        audit = agent.store.table.audit()
        assert audit.num_free + audit.num_granted + audit.num_sealed == audit.num_slots
        return not (audit.num_granted or audit.num_pinned or audit.num_leases or audit.num_readers)

    await until(unused)


async def until_readers(agent: Agent, num_readers: int) -> None:
    await until(lambda: agent.store.table.audit().num_readers == num_readers)


async def write_and_seal(publication: Publication, labels: Sequence[object], indices: Sequence[int]) -> None:
    blocks = [(index, write_block(publication.slot(index), block_data(labels[index]))) for index in indices]
    await publication.seal(blocks)


async def publish_all(client: KvAgentClient, *labels: object) -> None:
    async with client.publish(names(*labels)) as publication:
        await write_and_seal(publication, labels, list(publication.granted))


async def take(fetch: BlockFetch, labels: Sequence[object]) -> dict[int, int]:
    """Read everything that comes, check and release it; returns what was missing: index → code."""
    missing: dict[int, int] = {}
    arrived: list[int] = []
    async for batch in fetch:
        missing |= {block.index: block.code for block in batch.missing}
        for block in batch.arrived:
            into = bytearray(BLOCK_BYTES)
            assert read_block(fetch.slot(block), into, block.checksum)
            assert bytes(into) == block_data(labels[block.index])
            arrived.append(block.index)
            await fetch.release([block.index])
    assert sorted([*arrived, *missing]) == list(range(len(labels))), "each is answered exactly once"
    return missing


async def fetch_all(client: KvAgentClient, *labels: object, timeout_seconds: float = 5.0) -> dict[int, int]:
    async with client.fetch(names(*labels), timeout_seconds=timeout_seconds) as fetch:
        return await take(fetch, labels)


async def scrape(port: int | None) -> dict[str, float]:
    """An agent's relevo_* figures over HTTP, by their whole name: 'relevo_kv_slots{state="free"}'."""
    reply = await asyncio.to_thread(urlopen, f"http://127.0.0.1:{port}/metrics")
    with reply:
        lines = reply.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("relevo_"))}

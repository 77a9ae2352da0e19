"""Agents that have NIXL (pip install relevo[nixl]): it is probed beside tcp, and brings the same blocks."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import grpc
import pytest

from services.kvtransfer.client import KvAgentClient
from services.kvtransfer.transports.nixl import NotInstalled, load_nixl

from .blocks import names, publish_all, take, until, until_unused, write_and_seal
from .conftest import Connect, SpawnAgent, StartAgent

DATA_LOSS = grpc.StatusCode.DATA_LOSS.value[0]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]


@pytest.fixture(autouse=True)
def nixl_is_installed() -> None:
    try:
        load_nixl()
    except NotInstalled as error:
        pytest.skip(f"NIXL is not installed (pip install nixl): {error}")


async def pull(client: KvAgentClient, source: str, *labels: object, timeout_seconds: float = 5.0) -> dict[int, int]:
    async with client.fetch(names(*labels), source, timeout_seconds=timeout_seconds) as fetch:
        return await take(fetch, labels)


async def test_blocks_come_by_nixl_and_damaged_ones_are_dropped(start: StartAgent, connect: Connect) -> None:
    source, target = await start(transports=["nixl"]), await start(transports=["nixl"])
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a", "b", "c")
    source.store.arena.block(1)[77] ^= 4
    assert await pull(decode, source.address, "a", "b", "c") == {1: DATA_LOSS}
    (link,) = target.links.open_links
    assert link.puller.name == "nixl"
    assert target.links.counters.blocks == {"nixl": 2}


async def test_both_are_probed_and_the_quicker_is_taken(start: StartAgent, connect: Connect) -> None:
    source, target = await start(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a")
    assert await pull(decode, source.address, "a") == {}
    (link,) = target.links.open_links
    assert "quickest" in link.reason and "nixl " in link.reason and "tcp " in link.reason


async def test_agent_without_nixl_takes_tcp(start: StartAgent, connect: Connect) -> None:
    source, target = await start(transports=["tcp"]), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a")
    assert await pull(decode, source.address, "a") == {}
    assert target.links.open_links[0].puller.name == "tcp"


async def test_source_that_dies_is_unavailable(spawn: SpawnAgent, start: StartAgent, connect: Connect) -> None:
    source, target = spawn("--transports", "nixl"), await start(transports=["nixl"])
    prefill, decode = await connect(source.address), await connect(target.address)
    async with prefill.publish(names("a", "b")) as publication:
        await write_and_seal(publication, ("a", "b"), [0])
        async with decode.fetch(names("a", "b"), source.address, timeout_seconds=30) as fetch:
            assert [block.index for block in (await anext(fetch)).arrived] == [0]
            source.end(signal.SIGKILL)
            began = time.monotonic()
            assert [block.code for block in (await anext(fetch)).missing] == [UNAVAILABLE]
            assert time.monotonic() - began < 5
    await until_unused(target)
    await until(lambda: not target.links.open_links)
    await until(lambda: not [each for each in threading.enumerate() if each.name == "data-nixl"])


async def test_reader_that_leaves_ends_the_pull(start: StartAgent, connect: Connect) -> None:
    source, target = await start(transports=["nixl"]), await start(transports=["nixl"])
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a", "b", "c")
    for _ in range(5):
        pulling = asyncio.create_task(pull(decode, source.address, "a", "b", "c"))
        await asyncio.sleep(0.01)
        pulling.cancel()
        await asyncio.gather(pulling, return_exceptions=True)
        await until_unused(target)
    assert await pull(decode, source.address, "a", "b", "c") == {}

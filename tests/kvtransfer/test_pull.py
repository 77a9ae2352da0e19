"""Two agents: blocks that are announced at one are fetched at the other, over TCP."""

from __future__ import annotations

import asyncio
import signal
import socket
import time

import grpc

from services.kvtransfer.client import KvAgentClient

from .blocks import NUM_SLOTS, fetch_all, names, publish_all, take, until_readers, until_unused, write_and_seal
from .conftest import Connect, SpawnAgent, StartAgent

NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]
ABORTED = grpc.StatusCode.ABORTED.value[0]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


async def pull(client: KvAgentClient, source: str, *labels: object, timeout_seconds: float = 5.0) -> dict[int, int]:
    async with client.fetch(names(*labels), source, timeout_seconds=timeout_seconds) as fetch:
        return await take(fetch, labels)


async def test_blocks_come_over_from_another_process(spawn: SpawnAgent, connect: Connect) -> None:
    source, target = spawn(name="a"), spawn(name="b")
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a", "b", "c")
    assert await pull(decode, source.address, "a", "x", "b", "c") == {1: NOT_FOUND}
    assert await fetch_all(decode, "a", "b", "c") == {}, "they are here now"
    for client in (prefill, decode):
        audit = await client.audit()
        assert (audit.num_sealed, audit.num_free, audit.num_granted) == (3, NUM_SLOTS - 3, 0)


async def test_blocks_are_pulled_as_they_are_sealed(start: StartAgent, connect: Connect) -> None:
    source, target = await start(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    labels = ("a", "b", "c")
    async with (
        prefill.publish(names(*labels)) as publication,
        decode.fetch(names(*labels), source.address, timeout_seconds=5) as fetch,
    ):
        for index in (2, 0, 1):
            await write_and_seal(publication, labels, [index])
            assert [block.index for block in (await anext(fetch)).arrived] == [index]
    await until_unused(source)


async def test_block_that_is_here_is_not_pulled(start: StartAgent, connect: Connect) -> None:
    source, target = await start(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a", "b")
    await publish_all(decode, "a")
    assert await pull(decode, source.address, "a", "b") == {}
    assert sum(target.links.counters.bytes.values()) == target.store.arena.block_bytes


async def test_two_readers_pull_a_block_once(start: StartAgent, connect: Connect) -> None:
    source, target = await start(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    async with prefill.publish(names("a")) as publication:
        pulls = [asyncio.create_task(pull(decode, source.address, "a")) for _ in range(2)]
        await until_readers(target, 2)
        await write_and_seal(publication, ("a",), [0])
        assert await asyncio.gather(*pulls) == [{}, {}]
    assert sum(target.links.counters.bytes.values()) == target.store.arena.block_bytes


async def test_writer_that_gives_up_there_is_aborted_here(start: StartAgent, connect: Connect) -> None:
    source, target = await start(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    async with prefill.publish(names("a")):
        pulling = asyncio.create_task(pull(decode, source.address, "a"))
        await until_readers(source, 1)
    assert await pulling == {0: ABORTED}


async def test_reader_that_leaves_ends_the_pull(start: StartAgent, connect: Connect) -> None:
    source, target = await start(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    async with prefill.publish(names("a")):
        async with decode.fetch(names("a"), source.address, timeout_seconds=30):
            await until_readers(source, 1)
        await until_unused(target)
        await until_readers(source, 0)


async def test_time_is_over_while_pulling(start: StartAgent, connect: Connect) -> None:
    source, target = await start(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    async with prefill.publish(names("a")):
        assert await pull(decode, source.address, "a", timeout_seconds=0.2) == {0: DEADLINE_EXCEEDED}


async def test_no_room_here_refuses_what_would_be_pulled(start: StartAgent, connect: Connect) -> None:
    source, target = await start(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    await publish_all(prefill, "a")
    async with decode.publish(names(*range(NUM_SLOTS))):
        assert await pull(decode, source.address, "a") == {0: RESOURCE_EXHAUSTED}


async def test_source_that_is_not_there_is_unavailable(start: StartAgent, connect: Connect) -> None:
    target = await start()
    decode = await connect(target.address)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        began = time.monotonic()
        assert await pull(decode, f"127.0.0.1:{unused.getsockname()[1]}", "a", timeout_seconds=30) == {0: UNAVAILABLE}
        assert time.monotonic() - began < 5


async def test_source_that_dies_is_unavailable(spawn: SpawnAgent, start: StartAgent, connect: Connect) -> None:
    source, target = spawn(), await start()
    prefill, decode = await connect(source.address), await connect(target.address)
    async with prefill.publish(names("a", "b")) as publication:
        await write_and_seal(publication, ("a", "b"), [0])
        async with decode.fetch(names("a", "b"), source.address, timeout_seconds=30) as fetch:
            assert [block.index for block in (await anext(fetch)).arrived] == [0]
            source.end(signal.SIGKILL)
            began = time.monotonic()
            assert [block.code for block in (await anext(fetch)).missing] == [UNAVAILABLE]
            assert time.monotonic() - began < 5


async def test_other_slot_size_is_unavailable(start: StartAgent, connect: Connect) -> None:
    source, target = await start(), await start()
    await connect(source.address, block_bytes=20_000)
    decode = await connect(target.address)
    assert await pull(decode, source.address, "a") == {0: UNAVAILABLE}

"""One agent, over gRPC and shared memory."""

from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from relevo.core.errors import DeadlineExceeded, Exhausted, InvalidRequest, Mismatch, RelevoError
from services.common.errors import error_from_rpc
from services.common.grpc import make_channel
from services.kvtransfer.client import read_block
from services.pb import kvtransfer_pb2, kvtransfer_pb2_grpc

from .blocks import (
    ARENA_BYTES,
    BLOCK_BYTES,
    NUM_SLOTS,
    fetch_all,
    names,
    publish_all,
    until,
    until_readers,
    until_unused,
    write_and_seal,
)
from .conftest import Connect, StartAgent

NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]
ABORTED = grpc.StatusCode.ABORTED.value[0]
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


async def test_published_blocks_are_fetched(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    writer, reader = await connect(agent.address), await connect(agent.address, "decode-0")
    await publish_all(writer, "a", "b", "c")
    assert await fetch_all(reader, "a", "b", "c") == {}
    audit = await reader.audit()
    assert (audit.num_slots, audit.num_free, audit.num_sealed) == (NUM_SLOTS, NUM_SLOTS - 3, 3)


async def test_blocks_stream_in_as_they_are_sealed(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    labels = ("a", "b", "c")
    async with client.publish(names(*labels)) as publication, client.fetch(names(*labels), timeout_seconds=5) as fetch:
        for index in (1, 0, 2):
            await write_and_seal(publication, labels, [index])
            batch = await anext(fetch)
            assert [block.index for block in batch.arrived] == [index]
        with pytest.raises(StopAsyncIteration):
            await anext(fetch)


async def test_unannounced_block_is_not_found_at_once(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    await publish_all(client, "a")
    began = time.monotonic()
    assert await fetch_all(client, "x", "a", timeout_seconds=30) == {0: NOT_FOUND}
    assert time.monotonic() - began < 3


async def test_second_writer_of_a_block_is_granted_nothing(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    async with client.publish(names("a", "b")) as first:
        await write_and_seal(first, ("a", "b"), [0])
        async with client.publish(names("a", "b", "c")) as second:
            assert sorted(second.granted) == [2]
            assert second.sealed == {0}


async def test_writer_that_gives_up_is_aborted_for_those_who_wait(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    async with client.publish(names("a", "b")) as publication:
        waiting = asyncio.create_task(fetch_all(client, "a", "b"))
        await until_readers(agent, 1)
        await write_and_seal(publication, ("a", "b"), [0])
    assert await waiting == {1: ABORTED}
    await until_unused(agent)
    assert agent.store.table.audit().num_sealed == 1


async def test_silent_writer_loses_its_lease(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    async with client.publish(names("a"), lease_ms=500) as publication:
        for _ in range(3):
            await asyncio.sleep(0.2)
            await publication.seal([])  # keeps it
        assert await fetch_all(client, "a") == {0: ABORTED}
        with pytest.raises(DeadlineExceeded, match="lease_ms"):
            await publication.seal([(0, 1)])


async def test_reader_that_is_out_of_time_is_told_so(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    async with client.publish(names("a")):
        assert await fetch_all(client, "a", timeout_seconds=0.1) == {0: DEADLINE_EXCEEDED}


async def test_pins_end_with_the_readers_stream(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    await publish_all(client, "a", "b")
    async with client.fetch(names("a", "b"), timeout_seconds=5) as fetch:
        batch = await anext(fetch)
        assert len(batch.arrived) == 2
        assert (await client.audit()).num_pinned == 2
        await fetch.release([0])
        await until(lambda: agent.store.table.audit().num_pinned == 1)
    await until_unused(agent)


async def test_reader_that_never_releases_is_cut_off(start: StartAgent, connect: Connect) -> None:
    agent = await start(pin_seconds=0.1)
    client = await connect(agent.address)
    await publish_all(client, "a")
    async with client.fetch(names("a"), timeout_seconds=5) as fetch:
        await anext(fetch)
        await until_unused(agent)


async def test_full_arena_refuses_and_holds_nothing(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    async with client.publish(names(*range(6))):
        with pytest.raises(Exhausted):
            async with client.publish(names(*range(10, 13))):
                pytest.fail("it was granted")
        audit = await client.audit()
        assert (audit.num_free, audit.num_granted, audit.num_leases) == (2, 6, 1)
        await publish_all(client, "x", "y")


async def test_old_blocks_make_room_for_new_ones(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    for label in range(NUM_SLOTS):
        await publish_all(client, label)
    assert await fetch_all(client, 0) == {}  # used again
    await publish_all(client, "new")
    assert await fetch_all(client, 0, "new", 1) == {2: NOT_FOUND}


async def test_corrupt_block_is_noticed_and_dropped(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    async with client.publish(names("a")) as publication:
        await write_and_seal(publication, ("a",), [0])
        publication.slot(0)[BLOCK_BYTES - 1] ^= 1
    async with client.fetch(names("a"), timeout_seconds=5) as fetch:
        [block] = (await anext(fetch)).arrived
        assert not read_block(fetch.slot(block), bytearray(BLOCK_BYTES), block.checksum)
        await fetch.release([], corrupt=[block.index])
        await until_readers(agent, 0)
    assert await fetch_all(client, "a") == {0: NOT_FOUND}
    await publish_all(client, "a")
    assert await fetch_all(client, "a") == {}


async def test_arena_in_use_is_not_cut_anew(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    client = await connect(agent.address)
    async with client.publish(names("a")):
        with pytest.raises(Mismatch, match="in use with blocks of 5000 bytes, not 20000"):
            await connect(agent.address, "other", block_bytes=20_000)
    with pytest.raises(Mismatch, match="larger --kv-arena"):
        await connect(agent.address, "other", block_bytes=ARENA_BYTES + 1)


async def test_workers_of_the_former_cut_attach_again(start: StartAgent, connect: Connect) -> None:
    agent = await start()
    old = await connect(agent.address)
    await publish_all(old, "a")
    await connect(agent.address, "other", block_bytes=20_000)
    await publish_all(old, "b")  # cuts it back, because nobody uses it
    assert await fetch_all(old, "a", "b") == {0: NOT_FOUND}


@pytest.mark.parametrize(
    ("requests", "error"),
    [
        ([kvtransfer_pb2.PublishRequest(seal=kvtransfer_pb2.Seal())], InvalidRequest),
        (
            [kvtransfer_pb2.PublishRequest(announce=kvtransfer_pb2.Announce(block_hashes=[b"x"], lease_ms=9))],
            InvalidRequest,
        ),
        ([kvtransfer_pb2.PublishRequest(announce=kvtransfer_pb2.Announce(block_hashes=names("a")))], InvalidRequest),
        (
            [kvtransfer_pb2.PublishRequest(announce=kvtransfer_pb2.Announce(lease_ms=9, agent_incarnation="x"))],
            Mismatch,
        ),
    ],
)
async def test_wrong_use_is_refused(
    start: StartAgent, connect: Connect, requests: list[kvtransfer_pb2.PublishRequest], error: type[RelevoError]
) -> None:
    agent = await start()
    await connect(agent.address)
    async with make_channel(agent.address) as channel:
        call = kvtransfer_pb2_grpc.KvTransferStub(channel).Publish(iter(requests), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert type(error_from_rpc(caught.value)) is error


async def test_agent_says_that_it_is_healthy(start: StartAgent) -> None:
    agent = await start()
    async with make_channel(agent.address) as channel:
        for service in ("", "relevo.v1.KvTransfer"):
            request = health_pb2.HealthCheckRequest(service=service)
            reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING

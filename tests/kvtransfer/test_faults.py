"""An agent that fails on purpose: each kind of fault, as its clients see it; and none without --faults."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from relevo.core.errors import Unavailable
from services.common.grpc import make_channel
from services.kvtransfer.agent import Agent
from services.kvtransfer.client import read_block
from services.pb import chaos_pb2, chaos_pb2_grpc

from .blocks import BLOCK_BYTES, fetch_all, names, publish_all, until_unused
from .conftest import Connect, StartAgent

ALWAYS = 1.0


@asynccontextmanager
async def chaos(agent: Agent) -> AsyncIterator[Any]:
    async with make_channel(agent.address) as channel:
        yield chaos_pb2_grpc.ChaosStub(channel)


async def set_faults(agent: Agent, **faults: Any) -> chaos_pb2.Faults:
    async with chaos(agent) as stub:
        reply: chaos_pb2.Faults = await stub.SetFaults(chaos_pb2.SetFaultsRequest(**faults), timeout=5)
        return reply


async def test_without_the_option_there_is_no_such_service(start: StartAgent) -> None:
    agent = await start()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await set_faults(agent, drop_probability=ALWAYS)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_with_the_option_and_nothing_set_all_is_well(
    start: StartAgent, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    agent = await start(faults=True)
    assert "--faults" in caplog.text
    client = await connect(agent.address)
    await publish_all(client, "a", "b")
    assert await fetch_all(client, "a", "b") == {}
    assert (await set_faults(agent)).num_operations > 0


async def test_dropped_operations_are_unavailable_and_leave_nothing(start: StartAgent, connect: Connect) -> None:
    agent = await start(faults=True)
    client = await connect(agent.address)
    await publish_all(client, "a")
    await set_faults(agent, drop_probability=ALWAYS)
    with pytest.raises(Unavailable, match="on purpose"):
        await publish_all(client, "b")
    with pytest.raises(Unavailable, match="on purpose"):
        await fetch_all(client, "a")
    await until_unused(agent)
    faults = await set_faults(agent, drop_probability=0)
    assert faults.num_dropped == 2
    assert await fetch_all(client, "a") == {}


async def test_cut_streams_are_unavailable_and_leave_nothing(start: StartAgent, connect: Connect) -> None:
    agent = await start(faults=True)
    client = await connect(agent.address)
    await publish_all(client, "a")
    await set_faults(agent, cut_probability=ALWAYS)
    with pytest.raises(Unavailable, match="ended the stream"):
        await publish_all(client, "b")
    with pytest.raises(Unavailable, match="ended the stream"):
        await fetch_all(client, "a")
    await until_unused(agent)


async def test_delayed_operations_are_done_all_the_same(start: StartAgent, connect: Connect) -> None:
    agent = await start(faults=True)
    client = await connect(agent.address)
    await set_faults(agent, delay_probability=ALWAYS, delay_ms=1)
    await publish_all(client, "a")
    assert await fetch_all(client, "a") == {}
    assert (await set_faults(agent)).num_delayed > 3


async def test_corrupted_block_is_sealed_and_wrong(start: StartAgent, connect: Connect) -> None:
    agent = await start(faults=True)
    client = await connect(agent.address)
    await publish_all(client, "a", "b")
    async with chaos(agent) as stub:
        assert (await stub.CorruptBlocks(chaos_pb2.CorruptBlocksRequest(num_blocks=1), timeout=5)).num_blocks == 1
        good = []
        async with client.fetch(names("a", "b"), timeout_seconds=5) as fetch:
            async for batch in fetch:
                good += [read_block(fetch.slot(b), bytearray(BLOCK_BYTES), b.checksum) for b in batch.arrived]
        assert sorted(good) == [False, True]
        assert (await stub.CorruptBlocks(chaos_pb2.CorruptBlocksRequest(num_blocks=9), timeout=5)).num_blocks == 2


@pytest.mark.parametrize("value", [{"drop_probability": 1.5}, {"delay_ms": -1}, {"cut_probability": -0.1}])
async def test_value_that_makes_no_sense_changes_nothing(start: StartAgent, value: dict[str, Any]) -> None:
    agent = await start(faults=True)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await set_faults(agent, delay_probability=ALWAYS, **value)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await set_faults(agent)).delay_probability == 0


async def test_same_seed_same_faults(start: StartAgent, connect: Connect) -> None:
    agent = await start(faults=True)
    client = await connect(agent.address)
    outcomes = []
    for _ in range(2):
        await set_faults(agent, drop_probability=0.2, seed=5)
        run = []
        for number in range(12):
            try:
                await fetch_all(client, number)
                run.append(True)
            except Unavailable:
                run.append(False)
        outcomes.append(run)
    assert outcomes[0] == outcomes[1] and len(set(outcomes[0])) == 2

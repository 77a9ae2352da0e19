"""Blocks that agents hold, and what placement makes of them: real agents beside fake workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from services.kvtransfer.agent import Agent
from services.kvtransfer.client import KvAgentClient, write_block
from services.pb import decode_pb2, prefill_pb2
from tests.router.harness import Harness, collect, make_request, names_of, running, until
from tests.support.agents import running_agent

pytestmark = pytest.mark.timeout(20)

NUM_TOKENS = 400
NUM_BLOCKS = 100
BLOCK_BYTES = 1024


@pytest.fixture
async def agents(tmp_path: Path) -> AsyncIterator[list[Agent]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(running_agent(tmp_path, num_blocks=256)) for _ in range(2)]


async def fill(agent: Agent, num_blocks: int) -> None:
    """With leading blocks of the prompt."""
    client = KvAgentClient(agent.address, "writer", "incarnation")
    await client.attach(b"f" * 32, BLOCK_BYTES)
    names = names_of(make_request(NUM_TOKENS))[:num_blocks]
    async with client.publish(names) as publication:
        checksums = [write_block(publication.slot(index), bytes(BLOCK_BYTES)) for index in publication.granted]
        await publication.seal(zip(publication.granted, checksums, strict=True))
    await client.close()


async def until_known(harness: Harness, agent: Agent, num_blocks: int) -> None:
    await until(lambda: harness.fleet.index.num_blocks(f"agent {agent.address}") == num_blocks)


async def only_submit(harness: Harness, worker_id: str) -> decode_pb2.SubmitDecode | prefill_pb2.SubmitPrefill:
    entry = await harness.journal.wait(worker_id, "submit")
    submit: decode_pb2.SubmitDecode | prefill_pb2.SubmitPrefill = entry.command.submit
    return submit


async def test_blocks_come_and_go_as_the_agent_says(agents: list[Agent]) -> None:
    async with running("decode-0", agents={"decode-0": agents[0].address}) as harness:
        await fill(agents[0], 10)
        await until_known(harness, agents[0], 10)
        agents[0].store.table.clear()
        await until_known(harness, agents[0], 0)


async def test_direct_request_takes_its_agents_blocks(agents: list[Agent]) -> None:
    async with running("decode-0", agents={"decode-0": agents[0].address}) as harness:
        await fill(agents[0], NUM_BLOCKS)
        await until_known(harness, agents[0], NUM_BLOCKS)
        generation = harness.generate(NUM_TOKENS)
        await collect(generation)
        submit = await only_submit(harness, "decode-0")
        assert isinstance(submit, decode_pb2.SubmitDecode)
        assert submit.fetch.source_agent_address == agents[0].address
        assert generation.placement is not None
        best = generation.placement.best
        assert best.source == agents[0].address and best.num_uncached_tokens == 1
        assert best.terms["fetch_ms"] > 0


async def test_nothing_is_fetched_for_what_is_computed_sooner(agents: list[Agent]) -> None:
    async with running("decode-0", agents={"decode-0": agents[0].address}) as harness:
        await fill(agents[0], 1)  # 2 ms of computing, and 3 ms to ask for it
        await until_known(harness, agents[0], 1)
        await collect(harness.generate(NUM_TOKENS))
        submit = await only_submit(harness, "decode-0")
        assert isinstance(submit, decode_pb2.SubmitDecode) and not submit.HasField("fetch")


async def test_prefill_is_told_of_another_agent_that_has_more(agents: list[Agent]) -> None:
    addresses = {"prefill-0": agents[0].address, "decode-0": agents[1].address}
    async with running("prefill-0", "decode-0", agents=addresses) as harness:
        await fill(agents[0], 8)
        await fill(agents[1], 50)
        await until_known(harness, agents[0], 8)
        await until_known(harness, agents[1], 50)
        await collect(harness.generate(NUM_TOKENS))
        submit = await only_submit(harness, "prefill-0")
        assert isinstance(submit, prefill_pb2.SubmitPrefill)
        assert (submit.source_agent_address, submit.num_blocks_at_source) == (agents[1].address, 50)


async def test_agent_whose_workers_are_gone_is_still_of_use(agents: list[Agent]) -> None:
    """That is how the KV of a dead worker's requests is found."""
    addresses = {"decode-0": agents[0].address, "decode-1": agents[1].address}
    async with running("decode-0", "decode-1", agents=addresses) as harness:
        await fill(agents[0], NUM_BLOCKS)
        await until_known(harness, agents[0], NUM_BLOCKS)
        await harness["decode-0"].stop()
        await harness.until_connected("decode-0", False)
        await collect(harness.generate(NUM_TOKENS))
        submit = await only_submit(harness, "decode-1")
        assert isinstance(submit, decode_pb2.SubmitDecode)
        assert submit.fetch.source_agent_address == agents[0].address


async def test_agent_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(running_agent(tmp_path, num_blocks=256))
        harness = await stack.enter_async_context(running("decode-0", agents={"decode-0": agent.address}))
        await fill(agent, NUM_BLOCKS)
        await until_known(harness, agent, NUM_BLOCKS)
        agent.store.held.events.close()  # as a stop does first
        await until_known(harness, agent, 0)
        await collect(harness.generate(NUM_TOKENS))
        submit = await only_submit(harness, "decode-0")
        assert isinstance(submit, decode_pb2.SubmitDecode) and not submit.HasField("fetch")

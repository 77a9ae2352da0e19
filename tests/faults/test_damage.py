"""Bits that flip in sealed blocks, streams that end in the middle, an arena that is full: no token is another one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from relevo.core.block_hash import BlockHash
from services.common.grpc import make_channel
from services.kvtransfer.agent import Agent
from services.pb import chaos_pb2, chaos_pb2_grpc
from tests.faults.stack import GREEDY, NUM_PAGES, PAGES_PER_BLOCK, PROMPT, SETTINGS, Clients, router
from tests.support.agents import running_agent, until
from tests.support.parity import prompts, transformers_greedy
from tests.support.real_workers import RealWorker, real_worker

NUM_BLOCKS = len(PROMPT) // 16


@dataclass
class Whole:
    """near: decode's agent; far: prefill's, the same one or another."""

    near: Agent
    far: Agent
    decode: RealWorker
    clients: Clients


@asynccontextmanager
async def running(
    model: Path, arena_dir: Path, *, num_agents: int = 1, num_pages: int = NUM_PAGES, **options: Any
) -> AsyncIterator[Whole]:
    """At the end nothing may be held anywhere."""
    async with AsyncExitStack() as stack:
        agents = [
            await stack.enter_async_context(running_agent(arena_dir, num_pages, **options)) for _ in range(num_agents)
        ]
        near, far = agents[0], agents[-1]
        prefill = await stack.enter_async_context(real_worker(model, "prefill", far, **SETTINGS))
        decode = await stack.enter_async_context(real_worker(model, "decode", near, offer_share=0.0, **SETTINGS))
        clients = await stack.enter_async_context(router([decode.address], [prefill.address]))
        yield Whole(near, far, decode, clients)
        await clients.until_whole()


def flip_bits(agent: Agent) -> None:
    """In each block, as soon as it is sealed: of a number's exponent, so that the number becomes huge, or tiny."""
    store = agent.store
    on_sealed = store.on_sealed

    def sealed(name: BlockHash) -> None:
        if on_sealed is not None:
            on_sealed(name)
        block = store.arena.block(store.table._blocks[name].slot)
        block[4 * (name[0] % (len(block) // 4)) + 3] ^= 0x40

    store.on_sealed = sealed


@pytest.mark.parametrize(("num_agents", "where"), [(1, "here"), (2, "there"), (2, "here")])
async def test_flipped_bit_is_found_and_the_block_computed(
    model: Path, tmp_path: Path, num_agents: int, where: str
) -> None:
    """In shared memory; before the bytes go to another agent, over tcp; and when they have come there."""
    async with running(model, tmp_path, num_agents=num_agents) as whole:
        damaged = whole.near if where == "here" else whole.far
        flip_bits(damaged)
        answer = await whole.clients.generate(PROMPT, GREEDY)
        assert answer.was_split
        assert answer.token_ids == transformers_greedy(model)[3]
        assert damaged.store.counters.corrupt_blocks > 0
        assert whole.decode.num_computed_tokens >= len(PROMPT)


@pytest.mark.parametrize("num_agents", [1, 2])
@pytest.mark.parametrize("probability", [1.0, 0.3])
async def test_streams_that_end_in_the_middle(model: Path, tmp_path: Path, num_agents: int, probability: float) -> None:
    """Publish and Fetch, each time at another message."""
    async with running(model, tmp_path, num_agents=num_agents, faults=True) as whole:
        for seed in range(6):
            for agent in (whole.near, whole.far):
                await set_faults(agent, cut_probability=probability, seed=seed)
            answer = await whole.clients.generate(PROMPT, GREEDY, salt=str(seed))
            assert answer.token_ids == transformers_greedy(model)[3]
        assert (await set_faults(whole.far, cut_probability=0)).num_cut > 0
        await set_faults(whole.near, cut_probability=0)
        await until(lambda: not whole.clients.fleet.passed_over())  # prefill may have refused five times in a row
        before = whole.decode.num_computed_tokens
        answer = await whole.clients.generate(PROMPT, GREEDY, salt="next")
        assert answer.token_ids == transformers_greedy(model)[3]
        assert whole.decode.num_computed_tokens - before < len(PROMPT), "blocks are handed over again"


async def set_faults(agent: Agent, **faults: Any) -> chaos_pb2.Faults:
    async with make_channel(agent.address) as channel:
        stub = chaos_pb2_grpc.ChaosStub(channel)
        reply: chaos_pb2.Faults = await stub.SetFaults(chaos_pb2.SetFaultsRequest(**faults), timeout=5)
        return reply


async def corrupt_blocks(agent: Agent, num_blocks: int) -> None:
    async with make_channel(agent.address) as channel:
        stub = chaos_pb2_grpc.ChaosStub(channel)
        await stub.CorruptBlocks(chaos_pb2.CorruptBlocksRequest(num_blocks=num_blocks), timeout=5)


@pytest.mark.parametrize("num_agents", [1, 2])
async def test_arena_that_is_full(model: Path, tmp_path: Path, num_agents: int) -> None:
    """It has room for one prompt, and many come at once: those that find none are computed at decode."""
    num_pages = (NUM_BLOCKS + 1) * PAGES_PER_BLOCK
    async with running(model, tmp_path, num_agents=num_agents, num_pages=num_pages) as whole:
        for wave in range(2):
            answers = await whole.clients.generate_all(prompts() * 2, GREEDY, salt=str(wave))
            assert [answer.token_ids for answer in answers] == transformers_greedy(model) * 2

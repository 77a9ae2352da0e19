"""What workers get from the tiers below the arena, and what tenants don't get of one another: fake engines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from relevo.core.block_hash import hash_blocks, root_hash
from services.kvtransfer.agent import Agent
from tests.support.agents import is_unused, running_agent, until
from tests.support.fake_engine import FakeEngine, continuation
from tests.workers.harness import decode_stream, prefill_stream, running_decode, running_prefill
from tests.workers.pair import Pair

BLOCK_SIZE = 4
PROMPT = list(range(1, 31))  # 7 full blocks and 2 tokens
NUM_BLOCKS = len(PROMPT) // BLOCK_SIZE
EXPECTED = continuation(PROMPT, 6)


@asynccontextmanager
async def new_pair(agent: Agent) -> AsyncIterator[tuple[Pair, FakeEngine]]:
    """Workers whose pools are empty, and the engine that prefills."""
    async with (
        running_prefill(agent) as prefill,
        running_decode(agent) as decode,
        prefill_stream(prefill) as to_prefill,
        decode_stream(decode) as to_decode,
    ):
        yield Pair(to_prefill, to_decode), prefill.engine


async def until_below(agent: Agent, num_blocks: int) -> None:
    """The directory has them, and nobody is at work."""
    [disk] = agent.tiers.tiers
    await until(lambda: disk.num_blocks == num_blocks and is_unused(agent))


async def test_new_agent_and_workers_compute_no_more_than_the_prompts_tail(tmp_path: Path) -> None:
    """Everything was restarted; the directory is what is left."""
    async with running_agent(tmp_path, kv_disk=tmp_path / "kv") as agent, new_pair(agent) as (pair, _):
        assert await pair.serve(1, PROMPT) == EXPECTED
        await until_below(agent, NUM_BLOCKS)
    async with running_agent(tmp_path, kv_disk=tmp_path / "kv") as agent:
        await until_below(agent, NUM_BLOCKS)
        async with new_pair(agent) as (pair, prefill):
            assert await pair.serve(1, PROMPT) == EXPECTED
            assert prefill.num_computed_tokens == len(PROMPT) - NUM_BLOCKS * BLOCK_SIZE
        [disk] = agent.tiers.tiers
        assert disk.counters.hits == NUM_BLOCKS


@pytest.mark.parametrize("damaged", [0, 3, NUM_BLOCKS - 1])
async def test_damaged_block_below_is_computed_again(tmp_path: Path, damaged: int) -> None:
    async with running_agent(tmp_path, kv_disk=tmp_path / "kv") as agent:
        async with new_pair(agent) as (pair, prefill):
            assert await pair.serve(1, PROMPT) == EXPECTED
            names = hash_blocks(root_hash(prefill.info.fingerprint), PROMPT, BLOCK_SIZE)
        await until_below(agent, NUM_BLOCKS)
        damage(tmp_path, names[damaged].hex())
        agent.store.table.clear()
        async with new_pair(agent) as (pair, prefill):
            assert await pair.serve(1, PROMPT) == EXPECTED
            assert prefill.num_computed_tokens == len(PROMPT) - damaged * BLOCK_SIZE
        [disk] = agent.tiers.tiers
        assert disk.counters.damaged == 1


def damage(directory: Path, name: str) -> None:
    [path] = directory.rglob(f"{name}-*.kv")
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)


async def test_tenants_share_no_block_in_any_tier(tmp_path: Path) -> None:
    async with running_agent(tmp_path, kv_disk=tmp_path / "kv") as agent:
        for num_tenants, salt in enumerate(("", "a", "b"), 1):
            async with new_pair(agent) as (pair, prefill):
                await serve_salted(pair, salt)
                assert prefill.num_computed_tokens == len(PROMPT), "another tenant's blocks were used"
            await until_below(agent, num_tenants * NUM_BLOCKS)
        async with new_pair(agent) as (pair, prefill):
            await serve_salted(pair, "a")
            assert prefill.num_computed_tokens == len(PROMPT) - NUM_BLOCKS * BLOCK_SIZE, "its own are found"


async def serve_salted(pair: Pair, salt: str) -> None:
    await pair.fetch(await pair.submit(1, PROMPT, cache_salt=salt))
    first = await pair.relay_first_token()
    await pair.to_prefill.rest(1)
    token_ids, _ = await pair.to_decode.rest(1)
    assert [first, *token_ids] == EXPECTED

"""What decode computes is found at its agent by whoever comes next: fake engines around real agents."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from services.kvtransfer.agent import Agent
from services.worker.offering import MAX_QUEUED, Offering
from services.worker.worker import Worker
from tests.support.agents import is_unused, running_agent, until
from tests.support.fake_engine import FakeEngine, block_bytes_of, continuation
from tests.workers.harness import (
    RunningWorker,
    attached,
    decode_stream,
    prefill_stream,
    running_decode,
    running_local_decode,
    running_prefill,
    submit_decode,
    submit_fetching,
)
from tests.workers.pair import Pair

BLOCK_SIZE = 4
PROMPT = list(range(1, 31))  # 7 full blocks and 2 tokens
MAX_TOKENS = 9
ANSWER = continuation(PROMPT, MAX_TOKENS)
# The last token of an answer is not computed.
NUM_COMPUTED = len(PROMPT) + MAX_TOKENS - 1
NUM_BLOCKS = NUM_COMPUTED // BLOCK_SIZE
NEXT_TURN = [*PROMPT, *ANSWER, *range(50, 60)]


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    async with running_agent(tmp_path) as agent:
        yield agent


def offering_of(worker: Worker) -> Offering:
    offering = worker.on_stored.__self__  # type: ignore[union-attr]
    assert isinstance(offering, Offering)
    return offering


def num_sealed(agent: Agent) -> int:
    return agent.store.table.audit().num_sealed


async def answer_first_turn(agent: Agent) -> None:
    """Directly, on a decode worker that is gone afterwards."""
    async with running_decode(agent, offer_share=0.5) as decode, decode_stream(decode) as stream:
        await stream.send(submit_decode(1, PROMPT, MAX_TOKENS))
        await stream.next(1, "accepted")
        assert (await stream.rest(1))[0] == ANSWER
        await until(lambda: num_sealed(agent) == NUM_BLOCKS and is_unused(agent))


def check_bytes(agent: Agent) -> None:
    """What the agent holds is what its names say."""
    arena, table = agent.store.arena, agent.store.table
    reader = table.open_reader()
    for held in list(table.blocks()):
        slot = table.pin(reader, held.name).slot
        assert bytes(arena.block(slot)) == block_bytes_of(held.name, arena.block_bytes).tobytes()
    table.close_reader(reader)


@asynccontextmanager
async def far_pair(tmp_path: Path) -> AsyncIterator[tuple[Agent, RunningWorker, RunningWorker, Pair]]:
    """Another host: its agent, its prefill and decode workers, which have nothing, and a router's streams to them."""
    async with (
        running_agent(tmp_path) as far,
        running_prefill(far) as prefill,
        running_decode(far) as decode,
        prefill_stream(prefill) as to_prefill,
        decode_stream(decode) as to_decode,
    ):
        yield far, prefill, decode, Pair(to_prefill, to_decode, max_tokens=4)


async def test_answers_blocks_are_at_the_agent_under_their_names(agent: Agent) -> None:
    await answer_first_turn(agent)
    check_bytes(agent)


async def test_next_turn_on_another_decode_worker_computes_only_what_is_new(agent: Agent) -> None:
    await answer_first_turn(agent)
    async with running_decode(agent) as other, decode_stream(other) as stream:
        await stream.send(submit_fetching(1, NEXT_TURN))
        await stream.next(1, "accepted")
        token_ids, ended = await stream.rest(1)
        assert token_ids == continuation(NEXT_TURN, 4)
        assert other.engine.num_computed_tokens == len(NEXT_TURN) - NUM_BLOCKS * BLOCK_SIZE + 3
        assert ended.num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE


async def test_next_turn_on_another_host_takes_the_answer_from_there(agent: Agent, tmp_path: Path) -> None:
    """Prefill and decode are both elsewhere, and have nothing."""
    await answer_first_turn(agent)
    async with far_pair(tmp_path) as (far, prefill, _, pair):
        assert await pair.serve(1, NEXT_TURN, (agent.address, NUM_BLOCKS)) == continuation(NEXT_TURN, 4)
        assert prefill.engine.num_computed_tokens == len(NEXT_TURN) - NUM_BLOCKS * BLOCK_SIZE
        assert sum(far.links.counters.bytes.values()) == NUM_BLOCKS * far.store.arena.block_bytes


async def test_prefill_takes_what_decode_has_already_from_decodes_agent(agent: Agent, tmp_path: Path) -> None:
    """Decode keeps the conversation in its pool; of what it lacks, prefill publishes all, and of the rest nothing."""
    async with (
        running_agent(tmp_path) as far,
        running_prefill(far) as prefill,
        running_decode(agent, offer_share=0.5) as decode,
        prefill_stream(prefill) as to_prefill,
        decode_stream(decode) as to_decode,
    ):
        await to_decode.send(submit_decode(1, PROMPT, MAX_TOKENS))
        await to_decode.next(1, "accepted")
        assert (await to_decode.rest(1))[0] == ANSWER
        await until(lambda: num_sealed(agent) == NUM_BLOCKS and is_unused(agent))
        pair = Pair(to_prefill, to_decode, max_tokens=4)
        assert await pair.serve(2, NEXT_TURN, (agent.address, NUM_BLOCKS)) == continuation(NEXT_TURN, 4)
        assert prefill.engine.num_computed_tokens == len(NEXT_TURN) - NUM_BLOCKS * BLOCK_SIZE


async def test_blocks_that_the_source_lacks_are_computed_and_handed_over_like_the_others(
    agent: Agent, tmp_path: Path
) -> None:
    """The router's knowledge was old."""
    async with attached(agent, FakeEngine(), "nobody"), far_pair(tmp_path) as (_, prefill, decode, pair):
        assert await pair.serve(1, NEXT_TURN, (agent.address, NUM_BLOCKS)) == continuation(NEXT_TURN, 4)
        assert prefill.engine.num_computed_tokens == len(NEXT_TURN)
        assert decode.engine.num_computed_tokens == len(NEXT_TURN) % BLOCK_SIZE + 3


async def test_agent_that_is_not_there_is_computed_around(agent: Agent) -> None:
    async with running_decode(agent) as decode, decode_stream(decode) as stream:
        await stream.send(submit_fetching(1, NEXT_TURN, "127.0.0.1:1"))
        await stream.next(1, "accepted")
        assert (await stream.rest(1))[0] == continuation(NEXT_TURN, 4)


async def test_request_to_fetch_without_an_agent_is_computed() -> None:
    async with running_local_decode() as decode, decode_stream(decode) as stream:
        await stream.send(submit_fetching(1, PROMPT))
        await stream.next(1, "accepted")
        assert (await stream.rest(1))[0] == continuation(PROMPT, 4)


async def test_block_is_held_while_it_is_copied(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is needed for others meanwhile: they wait, and what is sealed is right."""
    copying, go_on = threading.Event(), threading.Event()
    engine = FakeEngine(num_blocks=16)
    real_leaving = engine.kv_cache.leaving

    def slow_leaving(block_ids: Any) -> Any:
        copying.set()
        assert go_on.wait(10)
        return real_leaving(block_ids)

    monkeypatch.setattr(engine.kv_cache, "leaving", slow_leaving)
    async with running_decode(agent, engine, offer_share=0.5) as decode, decode_stream(decode) as stream:
        await stream.send(submit_decode(1, PROMPT, MAX_TOKENS))
        assert (await stream.rest(1))[0] == ANSWER
        await until(copying.is_set)
        assert engine.scheduler.pool.num_free_blocks == 16 - NUM_BLOCKS
        other = [number + 100 for number in PROMPT]  # wants 10 of 16 blocks, of which 9 are being copied
        await stream.send(submit_decode(2, other, MAX_TOKENS))
        await until(lambda: len(engine.scheduler.waiting) == 1)
        go_on.set()
        assert (await stream.rest(2))[0] == continuation(other, MAX_TOKENS)
        await until(lambda: num_sealed(agent) >= NUM_BLOCKS and offering_of(decode.worker).is_idle)
    check_bytes(agent)


async def test_block_that_is_gone_when_its_turn_comes_is_not_offered(agent: Agent) -> None:
    engine = FakeEngine(num_blocks=16)
    async with running_decode(agent, engine, offer_share=0.5) as decode, decode_stream(decode) as stream:
        offering = offering_of(decode.worker)
        await stream.send(submit_decode(1, PROMPT, MAX_TOKENS))
        await stream.rest(1)
        blocks = engine.scheduler.pool.allocate(16)  # all names are gone
        assert blocks is not None
        engine.scheduler.pool.free(blocks)
        await until(lambda: offering.is_idle and is_unused(agent))
        assert num_sealed(agent) == 0


async def test_offers_take_their_share_of_time_and_no_more(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fifth of the time, four times as long as each offer took passes before the next one."""
    copy_seconds, share = 0.05, 0.2
    offered: list[tuple[float, float]] = []

    async with running_decode(agent, offer_share=share) as decode, decode_stream(decode) as stream:
        offering = offering_of(decode.worker)
        real_offer = offering._offer

        async def slow_offer(names: Any) -> None:
            began = asyncio.get_running_loop().time()
            await real_offer(names[:1])
            await asyncio.sleep(copy_seconds)
            offered.append((began, asyncio.get_running_loop().time()))

        monkeypatch.setattr(offering, "_offer", slow_offer)
        await stream.send(submit_decode(1, PROMPT * 5, MAX_TOKENS))  # 39 blocks: three offers
        await stream.rest(1)
        await until(lambda: offering.is_idle)
    assert len(offered) == 3
    for (began, ended), (next_began, _) in pairwise(offered):
        assert next_began - ended >= (ended - began) * (1 / share - 1) * 0.99


async def test_no_share_offers_nothing(agent: Agent) -> None:
    async with running_decode(agent, offer_share=0.0) as decode, decode_stream(decode) as stream:
        assert decode.worker.on_stored is None
        await stream.send(submit_decode(1, PROMPT, MAX_TOKENS))
        assert (await stream.rest(1))[0] == ANSWER
    assert num_sealed(agent) == 0


async def test_full_arena_takes_what_fits_and_refuses_nobody(tmp_path: Path) -> None:
    async with running_agent(tmp_path, num_blocks=3) as agent:
        async with running_decode(agent, offer_share=0.5) as decode, decode_stream(decode) as stream:
            await stream.send(submit_decode(1, PROMPT, MAX_TOKENS))
            assert (await stream.rest(1))[0] == ANSWER
            await until(lambda: num_sealed(agent) == 3 and offering_of(decode.worker).is_idle)
        check_bytes(agent)


async def test_agent_that_is_gone_is_said_once_and_decode_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.offering.RETRY_SECONDS", 0.0)
    async with running_agent(tmp_path) as agent:
        decode_context = running_decode(agent, offer_share=0.5)
        decode = await decode_context.__aenter__()
    try:
        async with decode_stream(decode) as stream:
            for handle in (1, 2):
                prompt = [number + handle for number in PROMPT]
                await stream.send(submit_decode(handle, prompt, MAX_TOKENS))
                assert (await stream.rest(handle))[0] == continuation(prompt, MAX_TOKENS)
                await until(lambda: offering_of(decode.worker).is_idle)
    finally:
        await decode_context.__aexit__(None, None, None)
    assert sum("the KV agent takes no blocks" in record.message for record in caplog.records) == 1


async def test_queue_is_bounded(agent: Agent) -> None:
    async with running_decode(agent, offer_share=0.5) as decode:
        offering = offering_of(decode.worker)
        names = [number.to_bytes(32, "little") for number in range(MAX_QUEUED + 10)]
        offering.stored(names)
        assert offering.num_dropped == 10
        offering._queue.clear()
        await until(lambda: offering.is_idle)

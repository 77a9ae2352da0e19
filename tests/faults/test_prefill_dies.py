"""Prefill is killed before, during and after each chunk of a prompt: the client gets every token all the same."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from services.kvtransfer.agent import Agent
from tests.faults.disturb import Fault
from tests.faults.stack import GREEDY, NUM_CHUNKS, NUM_PAGES, PROMPT, SETTINGS, flags, router
from tests.faults.zygote import Zygote
from tests.support.agents import is_unused, running_agent, until
from tests.support.parity import NUM_TOKENS, transformers_greedy
from tests.support.real_workers import RealWorker, real_worker

pytestmark = pytest.mark.asyncio(loop_scope="module")

FAULTS = [
    Fault(moment, chunk)
    for chunk in range(1, NUM_CHUNKS + 1)
    for moment in ("before", "computing", "copying", "sealed")
    if (moment, chunk) != ("sealed", NUM_CHUNKS)  # nothing is left to be struck then
]


@dataclass
class Side:
    """What stays, while one prefill worker after another dies."""

    agent: Agent
    decode: RealWorker
    path: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def side(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Side]:
    async with (
        running_agent(tmp_path_factory.mktemp("arena"), num_blocks=NUM_PAGES) as agent,
        real_worker(model, "decode", agent, **SETTINGS) as decode,
    ):
        yield Side(agent, decode, model)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.moment}-{fault.chunk}")
async def test_killed_at_any_moment(zygote: Zygote, side: Side, fault: Fault) -> None:
    prefill = await asyncio.to_thread(zygote.start, "prefill", *flags(side.path, side.agent.address), fault=fault)
    try:
        async with router([side.decode.address], [prefill.address]) as clients:
            before = side.decode.num_computed_tokens
            answer = await clients.generate(PROMPT, GREEDY, salt=str(fault))
            assert await asyncio.to_thread(prefill.wait) == -signal.SIGKILL, "the fault did not strike"
        assert answer.token_ids == transformers_greedy(side.path)[3]
        assert answer.was_split
        # What was sealed was not computed again, but for the row-block of the tail.
        num_sealed_tokens = num_sealed_blocks(fault) * 16
        num_computed = side.decode.num_computed_tokens - before
        assert num_computed <= len(PROMPT) - num_sealed_tokens + NUM_TOKENS
        await until(lambda: is_unused(side.agent))
    finally:
        await asyncio.to_thread(prefill.end)


def num_sealed_blocks(fault: Fault) -> int:
    """That decode can count on: what is copied while a later chunk is computed may or may not have come."""
    return fault.num_sealed_blocks if fault.moment == "sealed" else 0


async def test_killed_after_its_first_token(zygote: Zygote, side: Side) -> None:
    """The client has the token already, and decode waits for the last block."""
    fault = Fault("copying", NUM_CHUNKS, "hang")
    prefill = await asyncio.to_thread(zygote.start, "prefill", *flags(side.path, side.agent.address), fault=fault)
    try:
        async with router([side.decode.address], [prefill.address]) as clients:
            asking = asyncio.create_task(clients.generate(PROMPT, GREEDY, salt="first token"))
            await until(lambda: clients.num_tokens == 1)
            prefill.send(signal.SIGKILL)
            assert (await asking).token_ids == transformers_greedy(side.path)[3]
        await until(lambda: is_unused(side.agent))
    finally:
        await asyncio.to_thread(prefill.end)
